"""One frozen settings object out of a file, the environment and flags."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import ValidationError

from rekindle.errors import InvalidRequest, nearest
from rekindle.settings import Settings


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "rekindle.toml"


def refusal(file: Path | None = None, environ: dict[str, str] | None = None, **flags: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        Settings.load(file, environ or {}, **flags)
    return caught.value


def test_every_setting_has_a_default_and_a_description() -> None:
    settings = Settings.load(None, {})
    assert (settings.model, settings.port, settings.threads) == ("builtin", 8000, None)
    assert all(field.description for field in Settings.model_fields.values())


def test_flags_outweigh_the_environment_and_that_the_file(file: Path) -> None:
    file.write_text('model = "file"\nthreads = 1\nport = 1\nhost = "0.0.0.0"')
    environ = {"REKINDLE_MODEL": "environment", "REKINDLE_THREADS": "2", "PATH": "/bin", "rekindle_port": "9"}
    settings = Settings.load(file, environ, model="flag", threads=None)
    assert (settings.model, settings.threads, settings.port, settings.host) == ("flag", 2, 1, "0.0.0.0")


@given(st.lists(st.sampled_from(["file", "environment", "flag"]), unique=True))
@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_the_last_source_that_says_something_wins(file: Path, sources: list[str]) -> None:
    file.write_text("port = 1" if "file" in sources else "")
    environ = {"REKINDLE_PORT": "2"} if "environment" in sources else {}
    settings = Settings.load(file, environ, port=3 if "flag" in sources else None)
    expected = [("flag", 3), ("environment", 2), ("file", 1)]
    assert settings.port == next((value for source, value in expected if source in sources), 8000)


def test_without_a_mapping_the_processs_environment_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("REKINDLE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("REKINDLE_PORT", "1234")
    assert Settings.load().port == 1234


def test_an_unknown_name_is_refused_with_the_nearest_one_from_every_source(file: Path) -> None:
    file.write_text("thread = 2")
    for error in (refusal(file), refusal(environ={"REKINDLE_THREAD": "2"}), refusal(thread=2)):
        assert str(error) == "unknown setting 'thread'; did you mean 'threads'?"
        assert error.param == "thread"
    assert "known: allowed_host, api_key, api_key_file" in str(refusal(zzzzzz=1))
    file.write_text("[server]\nport = 1")
    assert "unknown setting 'server'" in str(refusal(file))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("threads", "two"),
        ("threads", ""),
        ("threads", 0),
        ("threads", 1.5),
        ("threads", True),
        ("threads", [1]),
        ("port", 65536),
        ("port", -1),
        ("port", "80 80"),
        ("port", 10**30),
        ("store_memory", -1),
        ("store_memory", float("nan")),
        ("model", 5),
        ("model", False),
        ("engine", "vllm"),
        ("kv_type", "F16"),
        ("block_tokens", 0),
        ("max_residents", 61),
    ],
)
def test_a_wrong_value_is_refused_with_its_name_and_what_was_got(name: str, value: object) -> None:
    flags: dict[str, Any] = {name: value}
    error = refusal(**flags)
    assert str(error).startswith(f"setting {name}: ") and str(error).endswith(f"got {value!r}")
    assert error.param == name


def test_a_password_is_in_no_message(file: Path) -> None:
    settings = Settings.load(None, {"REKINDLE_STORE_PASSWORD": "hush"}, store_url="redis://:hush@host")
    assert "hush" not in f"{settings!r} {settings}"
    assert settings.store_password is not None and settings.store_password.get_secret_value() == "hush"
    file.write_text("store_password = 12345678\nstore_url = ['redis://:12345678@host']")
    for flags in ({}, {"store_password": "fine"}):
        error = refusal(file, **flags)
        assert error.param in ("store_url", "store_password") and "12345678" not in str(error)


def test_wrong_values_from_a_file_and_the_environment(file: Path) -> None:
    assert refusal(environ={"REKINDLE_PORT": "http"}).param == "port"
    file.write_text("threads = true")
    assert "a number or text is expected, got True" in str(refusal(file))
    file.write_text("store_memory = 1e3")
    assert Settings.load(file, {}).store_memory == 1000


def test_a_file_that_cannot_be_read(file: Path, tmp_path: Path) -> None:
    assert "cannot read the settings file" in str(refusal(file)) and "No such file" in str(refusal(file))
    assert "Is a directory" in str(refusal(tmp_path))


@pytest.mark.parametrize("data", [b"port 8000", b"port = ", b"a = 1\na = 2", b"\xff\xfe", b"a = " + b"[" * 9999, b"\0"])
def test_a_file_that_is_not_toml(file: Path, data: bytes) -> None:
    file.write_bytes(data)
    assert "is not TOML" in str(refusal(file))


def test_a_byte_order_mark_is_no_mistake(file: Path) -> None:
    file.write_bytes(b"\xef\xbb\xbfport = 1")
    assert Settings.load(file, {}).port == 1


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError):
        Settings.load(None, {}).port = 1


def test_a_hint_names_the_nearest_or_all() -> None:
    assert nearest("modle", ["model", "engine"]) == "; did you mean 'model'?"
    assert nearest("x", ["model", "engine"]) == "; known: engine, model"
    assert nearest("x", []) == "; known: "


def test_a_setting_of_several_values_comes_as_an_array_a_list_or_one_text(file: Path) -> None:
    file.write_text('api_keys = ["one", "two"]\ncors_origin = "*"')
    settings = Settings.load(file, {})
    assert [key.get_secret_value() for key in settings.api_key] == ["one", "two"]
    assert settings.cors_origin == ("*",)
    for variable in ("REKINDLE_API_KEY", "REKINDLE_API_KEYS"):
        settings = Settings.load(file, {variable: "three, four"})
        assert [key.get_secret_value() for key in settings.api_key] == ["three", "four"]
    settings = Settings.load(file, {"REKINDLE_API_KEYS": "three"}, api_key=["five,six"])
    assert [key.get_secret_value() for key in settings.api_key] == ["five,six"]
    assert Settings.load(None, {}).api_key == ()


def test_several_values_named_twice_or_not_at_all_are_a_mistake() -> None:
    both = refusal(environ={"REKINDLE_API_KEY": "one", "REKINDLE_API_KEYS": "two"})
    assert str(both) == "settings api_key and api_keys are the same; use one of them"
    assert "at least one value is expected" in str(refusal(environ={"REKINDLE_API_KEY": " "}))


def test_an_api_key_is_in_no_message(file: Path) -> None:
    settings = Settings.load(None, {"REKINDLE_API_KEYS": "hush,quiet"}, port=1)
    assert not {"hush", "quiet"} & set(re.findall(r"\w+", f"{settings!r} {settings} {settings.model_dump_json()}"))
    for text in ("api_key = 12345678", "api_key = ['fine', 12345678]", "api_keys = {x = 12345678}"):
        file.write_text(text)
        error = refusal(file)
        assert error.param is not None and error.param.startswith("api_key") and "12345678" not in str(error)


@pytest.mark.parametrize("origin", ["https://a.org/", "https://a.org/x", "a.org", "https://", "https://x@a.org", "**"])
def test_a_cors_origin_that_no_browser_sends(origin: str) -> None:
    assert "expected * or an origin such as" in str(refusal(cors_origin=["*", origin]))
    assert (
        Settings.load(None, {}, cors_origin="https://a.org:8443,http://localhost").cors_origin[1] == "http://localhost"
    )
