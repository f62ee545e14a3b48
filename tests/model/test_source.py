"""Names of models: hub names against a stand-in hub on this machine, each look-up in a process of its own.

huggingface_hub reads its environment when it is imported, so a look-up here is `locate` in a new interpreter with the
hub's address, the cache folder and offline mode in its environment.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import socket
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from rekindle.errors import ModelError
from rekindle.model import ember
from rekindle.model.source import locate, parts

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOS = {
    "one/model": ["README.md", "model-q5_0.gguf", "mmproj-model-f16.gguf"],
    "many/usual": ["m-Q4_K_M.gguf", "m-Q8_0.gguf", "m-F16.gguf"],
    "many/half": ["sub/m-f16.gguf", "m-q5_0.gguf"],
    "many/odd": ["m-q5_0.gguf", "m-q6_k.gguf"],
    "no/gguf": ["README.md", "model.safetensors"],
    "safe/model": ["README.md", "config.json", "model.safetensors", "tokenizer.json", "modeling_own.py", "x.bin"],
    "both/kinds": [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "m-q5_0.gguf",
    ],
    "split/model": ["big-00001-of-00002.gguf", "big-00002-of-00002.gguf"],
}
_LOCATE = """
import sys
from rekindle.errors import ModelError
from rekindle.model.source import locate
for name in sys.argv[1:]:
    name, _, engine = name.partition("@")
    try:
        print(locate(name, engine or "auto"))
    except ModelError as error:
        print("ModelError:", error)
"""


def content(repo: str, file: str) -> bytes:
    return f"GGUF {repo} {file}\n".encode() * 100


class Hub(ThreadingHTTPServer):
    """What huggingface_hub asks of the hub: a repository's description, a file's head, a file."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.requests: list[str] = []  # "GET /api/models/one/model", …
        self.status: int | None = None  # answer everything with it

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        repo, _, file = path.removeprefix("/api/models").strip("/").partition("/resolve/main/")
        if self.server.status is not None:
            self._send(self.server.status, b"no", {})
        elif repo not in REPOS:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        elif path.startswith("/api/models/"):
            siblings = [{"rfilename": name} for name in REPOS[repo]]
            self._send(200, json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode(), {})
        elif file in REPOS[repo]:
            data = content(repo, file)
            self._send(200, data, {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT})
        else:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"})

    do_HEAD = do_GET  # noqa: N815

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


@dataclass
class User:
    """Somebody with a hub and a cache folder."""

    hub: Hub
    home: Path
    settings: dict[str, str] = field(default_factory=dict)

    def locate(self, name: str, **settings: str) -> str:
        """What `locate` gives, or its refusal."""
        return self.locate_all([name], **settings)[0]

    def locate_all(self, names: list[str], **settings: str) -> list[str]:
        """The same of several names, one after the other in one process."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        environment |= {"HF_ENDPOINT": self.hub.url, "HF_HOME": str(self.home), "NO_PROXY": "127.0.0.1"}
        environment |= {"HF_HUB_ETAG_TIMEOUT": "100", "HF_HUB_DOWNLOAD_TIMEOUT": "100"}  # a busy machine may take long
        run = subprocess.run(
            [sys.executable, "-W", "error", "-c", _LOCATE, *names],
            capture_output=True,
            text=True,
            env=environment | settings,
        )
        assert run.returncode == 0, run.stderr
        return run.stdout.splitlines()


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def user(hub: Hub, tmp_path: Path) -> User:
    return User(hub, tmp_path / "home")


@pytest.fixture
def nowhere() -> Iterator[str]:
    """An address that is taken, and where nobody listens."""
    with socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


def test_the_one_model_of_a_repository_is_downloaded_once(user: User) -> None:
    path = Path(user.locate("hf:one/model"))
    assert path.name == "model-q5_0.gguf" and path.is_relative_to(user.home / "hub")
    assert path.read_bytes() == content("one/model", "model-q5_0.gguf")
    assert user.locate("hf:one/model") == str(path)
    assert user.hub.requests.count("GET /one/model/resolve/main/model-q5_0.gguf") == 1


def test_what_was_downloaded_serves_when_the_hub_does_not(user: User, nowhere: str) -> None:
    path = user.locate("hf:many/usual:m-Q8_0.gguf")
    asked = len(user.hub.requests)
    names = ["hf:many/usual:m-Q8_0.gguf", "hf:many/usual"]
    assert user.locate_all(names, HF_HUB_OFFLINE="1") == [path, path]
    assert user.locate_all(names, HF_ENDPOINT=nowhere) == [path, path]
    assert len(user.hub.requests) == asked
    user.hub.status = 503
    assert user.locate("hf:many/usual") == path


def test_another_file_of_a_known_repository_is_not_there_offline(user: User) -> None:
    user.locate("hf:many/usual:m-Q8_0.gguf")
    text = user.locate("hf:many/usual:m-F16.gguf", HF_HUB_OFFLINE="1")
    assert "offline mode is set" in text and f"not in the local cache {user.home / 'hub'}" in text


def test_offline_without_a_cache_says_so_and_where_it_looked(user: User, nowhere: str) -> None:
    names = ["hf:one/model", "hf:one/model:model-q5_0.gguf"]
    for settings in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": nowhere}):
        for name, text in zip(names, user.locate_all(names, **settings), strict=True):
            assert text.startswith("ModelError:") and repr(name) in text
            assert "it cannot be reached" in text
            assert f"not in the local cache {user.home / 'hub'}" in text
            assert "path of a .gguf file" in text
    assert not user.hub.requests


def test_of_several_models_the_usual_quantisation_is_taken(user: User) -> None:
    four_bits, half = user.locate_all(["hf:many/usual", "hf:many/half"])
    assert four_bits.endswith("/m-Q4_K_M.gguf") and half.endswith("/sub/m-f16.gguf")


def test_of_several_unusual_ones_the_user_must_choose(user: User) -> None:
    text, chosen = user.locate_all(["hf:many/odd", "hf:many/odd:m-q6_k.gguf"])
    assert "name one, as hf:many/odd:FILE: m-q5_0.gguf, m-q6_k.gguf" in text
    assert chosen.endswith("m-q6_k.gguf")


def test_a_split_model_is_downloaded_whole(user: User) -> None:
    first = Path(user.locate("hf:split/model"))
    assert sorted(file.name for file in first.parent.iterdir()) == REPOS["split/model"]
    assert first.name == "big-00001-of-00002.gguf"
    assert user.locate("hf:split/model:big-00002-of-00002.gguf", HF_HUB_OFFLINE="1") == str(first)


def test_a_safetensors_model_is_downloaded_whole_and_nothing_else(user: User) -> None:
    folder = Path(user.locate("hf:safe/model"))
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    asked = len(user.hub.requests)
    assert user.locate("hf:safe/model@torch", HF_HUB_OFFLINE="1") == str(folder)
    assert len(user.hub.requests) == asked


def test_of_both_kinds_the_engine_decides_and_without_one_the_file(user: User) -> None:
    plain, llama, torch = user.locate_all(["hf:both/kinds", "hf:both/kinds@llama", "hf:both/kinds@torch"])
    assert plain == llama and plain.endswith("/m-q5_0.gguf")
    assert sorted(file.name for file in Path(torch).glob("*.safetensors")) == REPOS["both/kinds"][1:3]


def test_a_repository_that_has_nothing_for_an_engine_says_what_it_lacks(user: User) -> None:
    no_file, no_folder = user.locate_all(["hf:safe/model@llama", "hf:one/model@torch"])
    assert "has no .gguf file; Rekindle needs a model in that format" in no_file
    assert "has no config.json with model.safetensors for the torch engine" in no_folder


def test_what_the_hub_does_not_have_is_named(user: User) -> None:
    names = ["hf:no/where", "hf:no/where:x.gguf", "hf:many/odd:m-q5_1.gguf", "hf:no/gguf"]
    no_repository, no_repository_either, no_file, no_model = user.locate_all(names)
    assert "has no repository 'no/where', or it is private and no token is set" in no_repository
    assert "has no repository" in no_repository_either
    assert "has no file 'm-q5_1.gguf'; did you mean 'm-q5_0.gguf'?" in no_file
    assert "has no .gguf file" in no_model


@pytest.mark.parametrize("status", [401, 429, 500])
def test_a_hub_that_refuses_is_quoted(user: User, status: int) -> None:
    user.hub.status = status
    text = user.locate("hf:one/model")
    assert text.startswith("ModelError: cannot get 'hf:one/model' from the model hub: ")
    assert "not in the local cache" in text


BAD_NAMES = [
    "hf:",
    "hf:model",
    "hf:a/b/c",
    "hf:/",
    "hf:../x",
    "hf:a/b c",
    "hf:-a/b",
    "hf:a/b:../../x.gguf",
    "hf:a/" + "b" * 200,
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_mean_nothing_are_refused_without_asking(name: str) -> None:
    with pytest.raises(ModelError, match=r"expected hf:owner/repo|is not a hub name"):
        locate(name)


def test_a_path_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate("~/a.gguf") == tmp_path / "a.gguf"
    assert locate("models/b.gguf") == Path("models/b.gguf")
    assert locate("builtin") == locate("builtin", "llama") == ember.weights_path()
    assert locate("builtin", "torch") == ember.hf_path()


def test_parts_of_a_split_model_are_named_as_llama_cpp_does() -> None:
    assert parts("a.gguf") == ["a.gguf"]
    assert parts("a-00002-of-00003.gguf") == [f"a-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    assert parts("a-1-of-3.gguf") == ["a-1-of-3.gguf"]
