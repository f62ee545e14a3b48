"""`rekindle cache` on a real folder, with blocks of the built-in model."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import rekindle
from rekindle.cli.app import app
from rekindle.cli.cache_chunks import read_chunks

STORY = "Vodris paints in orange. This one works as a farmer. Nouraix is based in Viniton. "
DOCUMENTS = {"one.txt": STORY * 8, "two.txt": "Grevmar lives in Babmouth. " * 30, "short.txt": "Kundas plays the tuba."}
SMALL = {"REKINDLE_CONTEXT": "1024", "REKINDLE_THREADS": "1", "COLUMNS": "150", "TERM": "dumb", "NO_COLOR": "1"}


class Bench:
    """A folder of documents, a store, and the command."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.store = path / "store"
        self.exit_code = 0
        self.err = ""

    def __call__(self, *arguments: str, stdin: str | None = None, expect: int = 0, store: bool = True) -> str:
        """Run `rekindle cache …` to its end; what it wrote to stdout."""
        env = SMALL | ({"REKINDLE_STORE": str(self.store)} if store else {})
        done = CliRunner(env=env).invoke(app, ["cache", *arguments], input=stdin)
        self.err = done.stderr
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        assert done.exit_code == expect, done.output
        return done.stdout

    def json(self, *arguments: str, expect: int = 0) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self(*arguments, "--json", expect=expect))
        return found

    def file(self, name: str) -> str:
        return str(self.path / name)

    @property
    def blocks(self) -> list[Path]:
        return sorted((self.store / "v1").rglob("??/??/*.safetensors"))


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Three documents, warmed."""
    bench = Bench(tmp_path_factory.mktemp("filled"))
    for name, text in DOCUMENTS.items():
        (bench.path / name).write_text(text)
    first = bench.json("warm", *(bench.file(name) for name in DOCUMENTS))
    assert first["computed"] >= first["tokens"] - 6  # the first tokens of a chat are always the same
    return bench


@pytest.fixture
def bench(filled: Bench, tmp_path: Path) -> Iterator[Bench]:
    """A copy of it, to be changed."""
    shutil.copytree(filled.path, tmp_path / "copy")
    yield Bench(tmp_path / "copy")


# Warming.


def test_a_second_run_computes_nothing(filled: Bench) -> None:
    again = filled.json("warm", *(filled.file(name) for name in DOCUMENTS))
    assert again["computed"] == 0 and again["reused"] == again["tokens"] > 300
    assert [Path(each["name"]).name for each in again["prompts"]] == list(DOCUMENTS)
    assert all(each["bytes"] > 0 and each["tokens"] == each["reused"] for each in again["prompts"])


def test_what_was_warmed_is_what_a_chat_about_the_file_begins_with(filled: Bench) -> None:
    with rekindle.load(threads=1, context=1024, store=str(filled.store)) as llm:
        messages = [{"role": "system", "content": DOCUMENTS["one.txt"].strip()}, {"role": "user", "content": "Who?"}]
        llm.generate(messages, max_tokens=2)
        assert llm.last is not None and llm.last.usage.computed_tokens < 20 < llm.last.usage.cached_tokens


def test_prompts_raw_texts_systems_and_salts_are_different_things(bench: Bench) -> None:
    ways = [["--raw"], ["--system", "Be brief."], ["--salt", "mine"]]
    for way in ways:
        assert bench.json("warm", bench.file("one.txt"), *way)["computed"] > 100
        assert bench.json("warm", bench.file("one.txt"), *way)["computed"] == 0
    assert bench.json("warm", "-p", STORY * 4)["computed"] > 40
    with rekindle.load(threads=1, context=1024, store=str(bench.store)) as llm:
        llm.generate(STORY * 4, max_tokens=2)
        assert llm.last is not None and llm.last.usage.computed_tokens == 0


def test_the_table_says_what_was_done(bench: Bench) -> None:
    out = bench("warm", bench.file("one.txt"), "-p", "Where is Nouraix based? Tell me all about it.")
    assert "one.txt" in out and "“Where is Nouraix based?" in out and "in all" in out and "KiB" in out


def test_a_prompt_may_come_from_stdin(bench: Bench) -> None:
    out = bench("warm", "-p", "-", "--json", stdin="Whatever is said here, it is long enough.")
    assert json.loads(out)["prompts"][0]["computed"] > 5


def test_chunks_are_computed_on_their_own_and_placed_later(bench: Bench) -> None:
    (bench.path / "parts.txt").write_text(" # # ".join(DOCUMENTS[name] for name in ("one.txt", "two.txt")))
    documents = [{"title": "About Grevmar", "text": DOCUMENTS["two.txt"]}, STORY * 4]
    (bench.path / "parts.jsonl").write_text("\n".join(map(json.dumps, documents)))
    files = ["--chunks-from", bench.file("parts.txt"), "--chunks-from", bench.file("parts.jsonl")]
    found = bench.json("warm", "--chunk", STORY * 6, *files, "--chunk-separator", " # # ")
    names = [each["name"] for each in found["prompts"]]
    assert names[1:] == [f"{bench.file('parts.txt')} (1)", f"{bench.file('parts.txt')} (2)", "About Grevmar", names[4]]
    assert found["computed"] > 400 and bench.json("warm", "--chunk", STORY * 6)["computed"] == 0
    with rekindle.load(threads=1, context=1024, store=str(bench.store)) as llm:
        chunks = [rekindle.Chunk(DOCUMENTS["two.txt"].strip()), rekindle.Chunk(STORY * 6)]
        llm.generate([*chunks, "Who lives in Babmouth?"], max_tokens=2, blend={"select": "none"})
        assert llm.last is not None and [bool(chunk.placed) for chunk in llm.last.plan.chunks] == [True, True]
    with rekindle.load(threads=1, context=1024, store=str(bench.store)) as llm:  # which has not found the disk slow
        titled = [{"title": "About Grevmar", "text": DOCUMENTS["two.txt"]}]
        llm.chat([{"role": "user", "content": "Who?"}], documents=titled, max_tokens=2, blend={"select": "none"})
        assert llm.last is not None and llm.last.plan.chunks[0].placed > 150


@pytest.mark.parametrize(("name", "content"), [("a.txt", "One."), ("a.json", '["One."]'), ("a.jsonl", '"One."')])
def test_a_mark_of_the_encoding_is_no_part_of_a_chunk(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(f"\ufeff{content}", "utf-8")
    ((_, document),) = read_chunks(tmp_path / name, None)
    assert document.text == "One."


def test_one_file_that_does_not_fit_stops_no_other(bench: Bench) -> None:
    (bench.path / "long.txt").write_text(STORY * 100)
    found = bench.json("warm", bench.file("long.txt"), bench.file("two.txt"), "-p", STORY, expect=1)
    assert len(found["prompts"]) == 2
    assert "long.txt: the prompt has " in bench.err and "the context holds 1024" in bench.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["warm"], "expected files or --prompt TEXT"),
        (["warm", "nowhere.txt"], "cannot read"),
        (["warm", "{bytes}"], "is not a UTF-8 text file"),
        (["warm", "{empty}"], "is empty"),
        (["warm", "-p", " "], "the prompt is empty"),
        (["warm", "-p", "x", "--raw", "--system", "y"], "--system is for conversations"),
        (["warm", "-p", "x", "--store", "none"], "the store has no folder"),
        (["warm", "--chunk", " "], "the chunk is empty"),
        (["warm", "--chunks-from", "nowhere.txt"], "cannot read nowhere.txt"),
        (["warm", "--chunks-from", "{bytes}"], "it is not UTF-8 text"),
        (["warm", "--chunks-from", "{empty}"], "holds no chunk"),
        (["warm", "--chunks-from", "{json}"], "an array of texts or documents is expected"),
        (["warm", "--chunks-from", "{jsonl}"], "line 3: a document is expected as"),
        (["warm", "--chunks-from", "{torn}"], "line 1: no JSON"),
        (["pin", "-p", "x", "--ttl", "soon"], "expected a time such as 30s"),
        (["stats", "--store", "none"], "the store has no folder"),
        (["stats", "--store", "x", "--url", "y"], "expected --store or --url, got both"),
        (["ls", "--url", "ftp://x"], "expected a URL"),
        (["ls", "--fingerprint", "gpt"], "means no model; stored: ember"),
        (["ls", "--model", "nowhere.gguf"], "nowhere.gguf"),
        (["prune"], "expected what to delete: max_size"),
        (["prune", "--max-size", "much"], "expected a size such as 5GiB"),
        (["prune", "--older-than", "long"], "expected a time such as 30s"),
        (["clear", "--url", "http://127.0.0.1:9", "--fingerprint", "x"], "--fingerprint is for a folder"),
    ],
)
def test_mistakes_are_told(filled: Bench, arguments: list[str], message: str) -> None:
    (filled.path / "bytes").write_bytes(b"\xff\xfe\x00")
    (filled.path / "empty").write_text(" \n")
    (filled.path / "object.json").write_text('{"text": "x"}')
    (filled.path / "parts.jsonl").write_text('{"text": "x"}\n\n{"title": "x"}\n')
    (filled.path / "torn.jsonl").write_text('{"text": "x"\n')
    files = {name: filled.file(name) for name in ("bytes", "empty")} | {"json": filled.file("object.json")}
    files |= {"jsonl": filled.file("parts.jsonl"), "torn": filled.file("torn.jsonl")}
    named = [each.format(**files) for each in arguments]
    code = 1 if "--model" in arguments else 2
    filled(*named, expect=code)
    assert message in filled.err and "Traceback" not in filled.err


# Looking.


def test_stats_of_a_folder(filled: Bench) -> None:
    found = filled.json("stats")
    assert (found["state"], found["corrupt"], found["orphans"], found["unfinished"], found["set_aside"]) == (
        "ok",
        *[0] * 4,
    )
    assert (found["blocks"], found["bytes"]) == (len(filled.blocks), sum(model["bytes"] for model in found["models"]))
    (model,) = found["models"]
    assert (model["model"], model["kv_type"], model["prompts"], len(model["fingerprint"])) == ("ember", "f16", 3, 32)
    assert found["oldest_use"] <= found["newest_use"]
    out = filled("stats")
    assert "state" in out and "ok" in out and "ember" in out and model["fingerprint"][:12] in out


def test_ls_shows_prompts_by_their_first_words(filled: Bench) -> None:
    rows = filled.json("ls")["prompts"]
    assert len(rows) == 3
    texts = {row["text"][:20] for row in rows}
    assert texts == {text[:20] for text in DOCUMENTS.values()}
    for row in rows:
        assert row["tokens"] > 5 and row["bytes"] >= 4096 and row["whole"] and row["pinned_until"] is None
        assert (row["model"], row["position"]) == ("ember", 0)
    out = filled("ls")
    assert "Vodris paints in orange. This one works" in out and "ago" in out and "ember" in out


def test_ls_sorts_limits_and_lists_blocks(filled: Bench) -> None:
    rows = filled.json("ls", "--sort", "tokens")["prompts"]
    assert [row["tokens"] for row in rows] == sorted((row["tokens"] for row in rows), reverse=True)
    rows = filled.json("ls", "--sort", "size", "-n", "1")["prompts"]
    assert len(rows) == 1 and rows[0]["bytes"] == max(row["bytes"] for row in filled.json("ls")["prompts"])
    filled("ls", "-n", "1")
    assert "and 2 more" in filled.err
    blocks = filled.json("ls", "--blocks", "-n", "0")["prompts"]
    assert len(blocks) == len(filled.blocks)
    assert "tail" in filled("ls", "--blocks")
    assert len(filled.json("ls", "--fingerprint", "ember")["prompts"]) == 3


def test_without_its_model_tokens_are_shown_by_their_ids(bench: Bench) -> None:
    shutil.rmtree(bench.store / "v1" / "models")
    rows = bench.json("ls")["prompts"]
    assert all(row["text"] is None and len(row["first_tokens"]) > 3 for row in rows)
    assert "tokens " in bench("ls")
    named = bench.json("ls", "--model", "builtin")["prompts"]
    assert {row["text"][:20] for row in named} == {text[:20] for text in DOCUMENTS.values()}


def test_a_model_whose_file_is_another_one_now_shows_no_wrong_words(bench: Bench) -> None:
    (note,) = (bench.store / "v1" / "models").iterdir()
    facts = json.loads(note.read_text())
    facts["file"]["size"] += 1
    note.write_text(json.dumps(facts))
    assert all(row["text"] is None and row["model"] == "ember" for row in bench.json("ls")["prompts"])


# Checking.


def test_a_sound_folder_is_sound(filled: Bench) -> None:
    found = filled.json("verify")
    assert (found["ok"], found["problems"], found["blocks"]) == (True, [], len(filled.blocks))
    assert "nothing is wrong" in filled("verify")


def test_torn_files_are_told_and_set_aside_only_if_asked(bench: Bench) -> None:
    torn = next(path for path in bench.blocks if "." in path.stem)  # a tail
    torn.write_bytes(torn.read_bytes()[:-1])
    out = bench("verify", expect=1)
    assert str(torn) in out and "--repair sets them aside" in out and torn.exists()
    assert bench.json("verify", "--repair", expect=1)["set_aside"] == 1
    assert not torn.exists()
    assert bench.json("verify")["ok"]
    assert bench.json("stats")["set_aside"] == 1
    again = bench.json("warm", *(bench.file(name) for name in DOCUMENTS))
    assert 0 < again["computed"] < 70  # what was in the torn file, and no more


def test_holes_are_told_and_pruned(bench: Bench) -> None:
    whole = [path for path in bench.blocks if "." not in path.stem]
    rows = {row["key"]: row for row in bench.json("ls", "--blocks", "-n", "0")["prompts"]}
    head = next(path for path in whole if rows[path.stem]["position"] == 0)
    head.unlink()
    found = bench.json("verify", expect=1)
    assert found["torn"] == 0 and found["orphans"] >= 1
    assert "prune --orphans" in bench("verify", expect=1)
    orphans = bench.json("stats")["orphans"]
    assert bench.json("prune", "--orphans")["blocks"] == orphans > 0
    assert bench.json("verify")["ok"]


# Deleting.


def test_prune_deletes_what_it_says(bench: Bench) -> None:
    before = bench.json("stats")
    would = bench.json("prune", "--max-size", "200KB", "--dry-run")
    assert bench.json("stats")["blocks"] == before["blocks"] == would["blocks"] + would["left_blocks"]
    assert bench.json("prune", "--max-size", "200KB") == would
    after = bench.json("stats")
    assert (after["blocks"], after["bytes"]) == (would["left_blocks"], would["left_bytes"]) and 0 < after[
        "bytes"
    ] <= 200_000
    assert bench.json("verify")["ok"]
    assert bench.json("prune", "--older-than", "1h")["blocks"] == 0
    old = bench.blocks[0].stat().st_mtime - 7200
    for path in bench.blocks:
        os.utime(path, (old, old))
    assert bench.json("prune", "--older-than", "1h")["left_blocks"] == 0


def test_clear_asks_first(bench: Bench) -> None:
    num = len(bench.blocks)
    bench("clear", stdin="n\n", expect=1)
    assert f"Delete {num} blocks of ember" in bench.err and len(bench.blocks) == num
    bench("clear", stdin="", expect=1)  # nobody answers
    assert len(bench.blocks) == num
    assert f"{num} blocks deleted" in bench("clear", stdin="y\n")
    assert list(bench.store.iterdir()) == []
    bench("clear", "--yes")
    assert "Nothing is stored." in bench.err
    assert bench("ls") == "" and "Nothing is stored." in bench.err


def test_clear_may_be_for_one_model(bench: Bench) -> None:
    before = bench.json("stats")["blocks"]
    bench("warm", bench.file("one.txt"), "--kv-type", "q8_0")
    fingerprints = {model["kv_type"]: model["fingerprint"] for model in bench.json("stats")["models"]}
    bench("clear", "--yes", "--fingerprint", "ember", expect=2)  # there are two of this name
    assert "means several" in bench.err
    bench("clear", "--yes", "--fingerprint", fingerprints["q8_0"][:8])
    assert bench.json("stats")["blocks"] == before


# Pins.


def test_pins_of_a_folder(bench: Bench) -> None:
    assert bench.json("pins")["pins"] == []
    (made,) = bench.json("pin", bench.file("one.txt"), "--ttl", "2h")["pins"]
    (row,) = bench.json("pins")["pins"]
    assert (row["id"], row["tokens"]) == (made["id"], made["tokens"]) and row["text"].startswith("Vodris")
    assert re.search(r"1 h 5\d min", bench("pins"))
    assert bench.json("stats")["pins"] == 1
    assert [each["pinned_until"] is not None for each in bench.json("ls")["prompts"]].count(True) == 1
    bench("prune", "--max-size", "0")
    assert [each["key"] for each in bench.json("ls")["prompts"]] == [row["key"]]
    assert bench.json("warm", bench.file("one.txt"))["computed"] == 0
    bench("unpin", made["id"])
    assert bench.json("pins")["pins"] == []
    bench("unpin", made["id"], expect=1)
    assert f"there is no pin {made['id']}" in bench.err
    assert bench.json("prune", "--max-size", "0")["left_blocks"] == 0


def test_pinning_without_warming_keeps_what_there_is(bench: Bench) -> None:
    out = bench("pin", "--no-warm", "--ttl", "1h", "-p", "This was never read before, and it is not read now.")
    assert "nothing stored yet" in out
    assert bench.json("pins")["pins"] == []
    bench("pin", "--no-warm", "--ttl", "1h", bench.file("two.txt"))
    assert len(bench.json("pins")["pins"]) == 1


# Folders that can't be used.


@pytest.mark.parametrize("command", ["stats", "ls", "verify", "pins", "prune --orphans", "clear --yes", "unpin x"])
def test_folders_that_are_none_are_told(tmp_path: Path, command: str) -> None:
    bench = Bench(tmp_path)
    bench(*command.split(), "--store", str(tmp_path / "nowhere"), expect=1)
    assert "there is no folder" in bench.err
    (tmp_path / "file").write_text("")
    bench(*command.split(), "--store", str(tmp_path / "file"), expect=1)
    assert "expected the folder of a store, got the file" in bench.err
    (tmp_path / "home" / "photos").mkdir(parents=True)
    bench(*command.split(), "--store", str(tmp_path / "home"), expect=1)
    assert "is not a store" in bench.err and (tmp_path / "home" / "photos").exists()
    (tmp_path / "newer" / "v9").mkdir(parents=True)
    bench(*command.split(), "--store", str(tmp_path / "newer"), expect=1)
    assert "another version: expected v1, got v9" in bench.err


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can be somebody else")
def test_a_folder_of_somebody_else_is_told(bench: Bench) -> None:
    code = f"import os, sys; sys.argv = ['rekindle', 'cache', 'stats', '--store', {str(bench.store)!r}]"
    code += "; from rekindle.cli import main; import rekindle.cli.cache_look as look; look.folder_of(None)"
    code += "; os.setuid(65534); main()"  # who may not read the interpreter's own folders; all is imported by now
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | SMALL)
    assert done.returncode == 1, done.stderr
    assert "Permission denied" in done.stderr and "Traceback" not in done.stderr


def test_kv_that_could_not_be_written_is_told(bench: Bench) -> None:
    """The folder's place is taken by a file: everything is computed, and nothing is kept."""
    shutil.rmtree(bench.store)
    bench.store.write_text("")
    bench("warm", bench.file("one.txt"), expect=1)
    assert "the disk tier: " in bench.err
