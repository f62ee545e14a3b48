"""Log lines: one per record, in both formats, whatever a record holds; and no set-up by anybody but the command."""

from __future__ import annotations

import io
import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterator

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from rekindle.api.server import running
from rekindle.cli.logs import Format, JsonLines, TextLines, set_up
from rekindle.serve.request import request_id
from rekindle.serve.service import Service
from rekindle.settings import Settings

from .test_serve import served, url_in


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """Where a set-up writes to; what it changed is put back."""
    root, ours = logging.getLogger(), logging.getLogger("rekindle")
    before = root.handlers[:], root.level, ours.level
    yield io.StringIO()
    root.handlers[:], root.level, ours.level = before[0], before[1], before[2]
    logging.Logger.manager._clear_cache()  # type: ignore[attr-defined]


def record(message: str, **fields: object) -> logging.LogRecord:
    made = logging.LogRecord("rekindle.room", logging.INFO, "file.py", 1, message, None, None)
    made.fields = fields
    return made


def test_a_line_of_text() -> None:
    line = TextLines().format(record("answered", status=200, route="/generate", path="a b", empty="", tokens=None))
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z INFO rekindle\.room: answered "
        r'status=200 route=/generate path="a b" empty="" tokens=None',
        line,
    )


def test_a_line_of_json() -> None:
    line = json.loads(JsonLines().format(record("answered", status=200, ttft_ms=1.5)))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line.pop("time"))
    assert line == {
        "level": "info",
        "logger": "rekindle.room",
        "message": "answered",
        "status": 200,
        "ttft_ms": 1.5,
    }


@given(message=st.text(), value=st.text())
@pytest.mark.parametrize("formatter", [TextLines(), JsonLines()])
def test_nothing_breaks_a_line(formatter: logging.Formatter, message: str, value: str) -> None:
    line = formatter.format(record(message.replace("%", ""), value=value))
    assert len(line.splitlines()) == 1


def test_the_id_of_the_request_that_is_worked_on_is_in_every_line() -> None:
    token = request_id.set("r-1")
    try:
        assert json.loads(JsonLines().format(record("hm")))["request_id"] == "r-1"
        assert TextLines().format(record("hm")).endswith("hm request_id=r-1")
        assert json.loads(JsonLines().format(record("hm", request_id="own")))["request_id"] == "own"
    finally:
        request_id.reset(token)


def test_a_traceback_is_part_of_a_json_line() -> None:
    made = record("it failed")
    try:
        raise ValueError("made to fail")
    except ValueError:
        made.exc_info = sys.exc_info()
    line = JsonLines().format(made)
    assert len(line.splitlines()) == 1 and "made to fail" in json.loads(line)["exception"]
    assert TextLines().format(made).endswith("ValueError: made to fail")


@pytest.mark.parametrize(
    ("level", "ours", "others"),
    [("debug", "debug", "info"), ("info", "info", "warning"), ("error", "error", "warning")],
)
def test_levels(stream: io.StringIO, level: str, ours: str, others: str) -> None:
    set_up("json", level, stream)
    set_up("json", level, stream)  # does not double the lines
    for name in ("rekindle.room", "another"):
        for each in ("debug", "info", "warning", "error"):
            logging.getLogger(name).log(logging.getLevelNamesMapping()[each.upper()], each)
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert next(line["level"] for line in lines if line["logger"] == "rekindle.room") == ours
    assert next(line["level"] for line in lines if line["logger"] == "another") == others
    assert len(lines) == len({(line["logger"], line["level"]) for line in lines})


def test_a_refused_socket_is_no_error_of_the_server(stream: io.StringIO) -> None:
    set_up("text", "info", stream)
    settings = Settings(engine="toy", store="none")
    with Service.open(settings) as service, running(service) as url, pytest.raises(InvalidStatus) as refused:
        connect(url.replace("http", "ws", 1) + "/ws?resume=nothing", open_timeout=60, proxy=None)
    assert refused.value.response.status_code == 400
    assert "status=400" in stream.getvalue() and "ERROR" not in stream.getvalue()


def test_importing_sets_nothing_up() -> None:
    code = (
        "import logging, rekindle, rekindle.api.server, rekindle.cli.app, rekindle.cli.logs\n"
        "assert not logging.getLogger().handlers and logging.getLogger().level == logging.WARNING\n"
        "assert not any(getattr(each, 'handlers', None) for name, each in logging.Logger.manager.loggerDict.items()"
        " if name.startswith('rekindle'))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("format", ["text", "json"])
def test_a_server_logs_one_line_per_request(environment: dict[str, str], format: Format) -> None:
    with served(environment, "--engine", "toy", "--log-format", format) as (process, line):
        headers = {"x-request-id": "mine"}
        body = {"prompt": "nobodys business", "max_new_tokens": 3}
        assert httpx.post(f"{url_in(line)}/generate", json=body, headers=headers, timeout=60).status_code == 200
        assert httpx.get(f"{url_in(line)}/health").status_code == 200
        process.terminate()
        _, err = process.communicate(timeout=60)
    (found,) = [line for line in err.splitlines() if "rekindle.access" in line]
    if format == "json":
        fields = json.loads(found)
        assert (fields["request_id"], fields["completion_tokens"], fields["route"]) == ("mine", 3, "/generate")
    assert "mine" in found and "business" not in err
