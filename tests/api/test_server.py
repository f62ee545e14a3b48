"""The server itself: ports, signals, several at once."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys

import httpx
import pytest

from rekindle.api.app import create_app
from rekindle.api.server import running
from rekindle.errors import InvalidRequest
from rekindle.serve.service import Service

PROGRAM = """
from rekindle.api.server import serve
from rekindle.serve.service import Service
from rekindle.settings import Settings
with Service.open(Settings(engine="toy")) as service:
    serve(service, port=0, ready=lambda url: print(url, flush=True))
print("closed", flush=True)
"""


FIRST = """
import http.client, json, sys
from rekindle.api.server import running
from rekindle.serve.service import Service
from rekindle.settings import Settings
with Service.open(Settings(engine="toy", store="none")) as service, running(service) as url:
    ready = set(sys.modules)
    for stream in (False, True):
        connection = http.client.HTTPConnection(url.removeprefix("http://"))
        body = {"messages": [{"role": "user", "content": "Hello."}], "max_tokens": 3, "stream": stream}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
        response = connection.getresponse()
        assert response.status == 200 and response.read()
    print(*sorted(set(sys.modules) - ready))
"""


def test_the_first_requests_wait_for_no_import() -> None:
    done = subprocess.run([sys.executable, "-c", FIRST], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr


def test_a_port_in_use_is_told_at_once(service: Service, url: str) -> None:
    port = int(url.rpartition(":")[2])
    with pytest.raises(InvalidRequest, match=f"127.0.0.1:{port}: .*; choose another port"), running(service, port=port):
        pass


def test_an_address_that_is_not_ours(service: Service) -> None:
    with pytest.raises(InvalidRequest, match=r"cannot listen on 192\.0\.2\.1"), running(service, host="192.0.2.1"):
        pass


def test_two_servers_on_one_service(service: Service, url: str) -> None:
    with running(service) as other:
        assert other != url
        for base in (url, other):
            assert httpx.get(f"{base}/health").status_code == 200
    assert httpx.get(f"{url}/health").status_code == 200


def test_what_comes_to_be_submitted_after_all_were_cut_is_told_so_too(service: Service) -> None:
    """A request whose prompt was still being tokenized then."""
    app = create_app(service)
    app.state.runner.stop()

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as http:
            return await http.post("/generate", json={"prompt": "Hello."})

    answer = asyncio.run(ask())
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "stopping")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_server_and_lets_its_caller_clean_up(number: signal.Signals) -> None:
    command = [sys.executable, "-W", "error", "-c", PROGRAM]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("REKINDLE_")}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert httpx.get(f"{url}/health").json()["status"] == "ok"
        process.send_signal(number)
        assert process.stdout.read().split() == ["closed"]
    assert process.returncode == 0
