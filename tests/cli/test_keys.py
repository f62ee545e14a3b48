"""API keys on the command line: they come in by file, environment and option, and go out only to the server."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import httpx

from .conftest import Run
from .test_serve import served, url_in

ONE, TWO = "sk-cli-1c2d", "sk-cli-9f8e"


def test_keys_come_from_option_environment_and_file(environment: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# for tests\nalice:{TWO}\n")
    options = ["--engine", "toy", "--api-key", ONE, "--api-key", "sk-third", "--api-key-file", str(file)]
    with served(environment, *options) as (process, line):
        url = url_in(line)
        assert httpx.get(f"{url}/v1/models").status_code == 401
        for key in (ONE, TWO, "sk-third"):
            assert httpx.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 200
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "sk-" not in line + out + err
    with served(environment | {"REKINDLE_API_KEYS": f"{ONE},{TWO}"}, "--engine", "toy") as (_, line):
        for key, status in ((ONE, 200), (TWO, 200), ("sk-third", 401)):
            assert httpx.get(f"{url_in(line)}/v1/models", headers={"x-api-key": key}).status_code == status


def test_chat_and_demo_bring_the_environments_key(environment: dict[str, str], run: Run, run_here: Run) -> None:
    with served(environment | {"REKINDLE_API_KEY": ONE}) as (_, line):
        chat = ("chat", "--url", url_in(line), "--max-tokens", "4")
        without, having = (run(*chat, stdin="Hello.\n/stats\n", env=env) for env in ({}, {"REKINDLE_API_KEY": ONE}))
        given = run_here(*chat, "--api-key", ONE, stdin="Hello.\n")
        asked = run_here("generate", "Hello.", "--url", url_in(line), "--max-tokens", "4", "--api-key", ONE)
        toured = run("demo", "--rounds", "1", "--url", url_in(line), "--api-key", ONE)
        demo = run("demo", "--rounds", "1", "--json", "--url", url_in(line), env={"REKINDLE_API_KEYS": f"{ONE},{TWO}"})
    assert without.returncode == 1 and "refused (401): expected an API key in the header" in without.stderr
    assert having.returncode == 0, having.stderr
    assert (given.returncode, asked.returncode) == (0, 0), given.stderr + asked.stderr
    assert toured.returncode == 0, toured.stderr
    assert demo.returncode == 0 and json.loads(demo.stdout)["steps"], demo.stderr
    assert ONE not in having.stdout + having.stderr + without.stderr + demo.stdout + demo.stderr


def test_bad_keys_are_told_before_a_model_is_loaded(run: Run, tmp_path: Path) -> None:
    """What else is wrong with them: tests/api/test_keys.py."""
    empty = tmp_path / "keys"
    empty.write_text("# nobody\n")
    for options, message in (
        (("--api-key-file", str(empty)), f"the key file {empty} holds no key"),
        (("--api-key", "two words"), "API key 'key-1': expected printable ASCII without spaces"),
    ):
        result = run("serve", *options)
        assert result.returncode == 2
        assert result.stderr.startswith(f"rekindle: {message}") and len(result.stderr.splitlines()) == 1
        assert "two words" not in result.stderr


def test_no_help_and_no_complaint_shows_a_key(run_here: Run, environment: dict[str, str]) -> None:
    environment["REKINDLE_API_KEY"] = ONE
    for arguments in (("serve", "--help"), ("serve", "--port", "x"), ("serve", "--api-key", TWO, "--threads", "0")):
        result = run_here(*arguments)
        assert result.stdout + result.stderr
        assert ONE not in result.stdout + result.stderr and TWO not in result.stdout + result.stderr


def test_a_server_that_is_open_to_a_network_says_so(environment: dict[str, str]) -> None:
    for key, is_told in ((), True), (("--api-key", ONE), False):
        with served(environment, "--engine", "toy", "--host", "0.0.0.0", *key) as (process, line):
            assert httpx.get(f"{url_in(line)}/health").status_code == 200
            process.send_signal(signal.SIGTERM)
            _, err = process.communicate(timeout=60)
        assert ("anybody who reaches 0.0.0.0 may use this server: no API key is set" in err) is is_told
