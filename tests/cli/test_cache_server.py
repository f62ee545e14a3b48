"""`rekindle cache --url`: the same commands on a running server, a process of its own."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rekindle.cli.app import app

from .conftest import SMALL
from .test_client import server as odd_server
from .test_serve import served, url_in

STORY = "Vodris paints in orange. This one works as a farmer. Nouraix is based in Viniton. " * 8
KEY = "sk-first-1f0c"
TERMINAL = {"COLUMNS": "150", "TERM": "dumb", "NO_COLOR": "1"}
Cache = Callable[..., str]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """URL and folder of a server with one API key."""
    home = tmp_path_factory.mktemp("home")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("REKINDLE_")}
    own = {"HOME": str(home), "XDG_CACHE_HOME": str(home), "REKINDLE_API_KEY": KEY}
    with served(kept | own | SMALL, "--store", str(home / "store")) as (_, line):
        yield url_in(line), home / "store"


def called(*arguments: str, env: dict[str, str] | None = None, stdin: str = "") -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `rekindle cache …`."""
    done = CliRunner(env=TERMINAL | (env or {})).invoke(app, ["cache", *arguments], input=stdin)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout, done.stderr


@pytest.fixture
def cache(server: tuple[str, Path]) -> Cache:
    """Call `rekindle cache … --url` with the key in the environment; its stdout, and stderr if it is to fail."""

    def call(*arguments: str, expect: int = 0, key: str = KEY, stdin: str = "") -> str:
        code, out, err = called(*arguments, "--url", server[0], env={"REKINDLE_API_KEY": key}, stdin=stdin)
        assert code == expect, out + err
        return out + (err if expect else "")

    return call


def asked(cache: Cache, *arguments: str, **options: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(cache(*arguments, "--json", **options))
    return found


def test_warming_chunks_of_a_server(cache: Cache, tmp_path: Path) -> None:
    file = tmp_path / "parts.json"
    file.write_text(
        json.dumps([{"title": "About Ostrel", "text": "Ostrel drives a red van. " * 20}, "Kundas sings. " * 30])
    )
    first = asked(cache, "warm", "--chunk", "Palluk has a red bridge. " * 20, "--chunks-from", str(file))
    assert [each["computed"] > 50 for each in first["prompts"]] == [True] * 3 and first["bytes"] > 0
    for way in ([], ["--chat"], ["--raw"]):  # one line is the same chunk in both
        again = asked(cache, "warm", "--chunk", "Palluk has a red bridge. " * 20, *way)
        assert (again["computed"] == 0) == (way != ["--raw"]), "here a template writes a space before each line"


def test_warming_a_server_and_looking_at_it(cache: Cache, tmp_path: Path) -> None:
    file = tmp_path / "story.txt"
    file.write_text(STORY)
    first = asked(cache, "warm", str(file), "-p", "Where is Nouraix based, and who says so?")
    assert first["computed"] > 100 and len(first["prompts"]) == 2
    assert asked(cache, "warm", str(file))["computed"] == 0
    stats = asked(cache, "stats")
    assert [tier["name"] for tier in stats["tiers"]] == ["memory", "disk"] and stats["tiers"][1]["blocks"] > 0
    out = cache("stats")
    assert "memory" in out and "disk" in out and "ok" in out
    rows = asked(cache, "ls")["prompts"]
    assert any(row["text"].startswith("Vodris paints in orange.") for row in rows)
    assert "Vodris paints in orange." in cache("ls", "-n", "5")
    assert asked(cache, "verify")["ok"]


def test_pins_of_a_server(cache: Cache) -> None:
    (made,) = asked(cache, "pin", "-p", STORY, "--ttl", "2h", "--name", "the story")["pins"]
    assert made["bytes"] > 0
    assert [pin["name"] for pin in asked(cache, "pins")["pins"]] == ["the story"]
    assert "the story" in cache("pins")
    cache("unpin", made["id"])
    assert f"there is no pin {made['id']}" in cache("unpin", made["id"], expect=1)
    assert asked(cache, "pins")["pins"] == []


def test_pruning_and_clearing_a_server(cache: Cache, server: tuple[str, Path]) -> None:
    asked(cache, "warm", "-p", STORY)
    assert asked(cache, "prune", "--older-than", "1h", "--dry-run")["left_blocks"] > 0
    cache("clear", stdin="n\n", expect=1)
    assert asked(cache, "ls")["total"] > 0
    cache("clear", "--yes")
    assert list((server[1] / "v1").rglob("??/??/*.safetensors")) == []


def test_a_prompt_too_long_is_told(cache: Cache, tmp_path: Path) -> None:
    file = tmp_path / "long.txt"
    file.write_text(STORY * 30)
    told = cache("warm", str(file), expect=1)
    assert "long.txt: " in told and "the context holds 2048" in told


def test_the_key_is_asked_for(cache: Cache) -> None:
    assert "not one of this server's" in cache("stats", key="sk-wrong", expect=1)
    assert asked(cache, "stats", "--api-key", KEY, key="sk-wrong")["tiers"]


def test_servers_that_are_none_are_told() -> None:
    code, _, err = called("stats", "--url", "http://127.0.0.1:9")
    assert code == 1 and "cannot talk to http://127.0.0.1:9" in err
    for body in (b"<html>", b'{"object": "list"}'):
        with odd_server(200, body) as url:
            for command in ("stats", "ls", "pins", "verify", "prune --orphans", "warm -p x", "pin -p x --ttl 1h"):
                code, _, err = called(*command.split(), "--url", url)
                assert code == 1 and "is it a Rekindle server?" in err, command
    with odd_server(404, b'{"detail": "Not Found"}') as url:
        code, _, err = called("ls", "--url", url)
        assert code == 1 and "refused (404)" in err
