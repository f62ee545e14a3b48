"""Options are the settings, no more and no less, and are checked by `Settings` itself."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from rekindle.cli.app import app
from rekindle.cli.options import SERVER_ONLY, default_of, flag_of, variable_of, with_settings
from rekindle.cli.refusals import guarded
from rekindle.settings import Settings


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    for name in Settings.model_fields:
        monkeypatch.delenv(variable_of(name), raising=False)
    return CliRunner(env={"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"})


@pytest.fixture
def echo() -> typer.Typer:
    """A command that prints the settings it got."""
    echo = typer.Typer()

    @echo.command()
    @guarded
    @with_settings()
    def show(settings: Settings, word: str = "none") -> None:
        typer.echo(settings.model_dump_json())
        typer.echo(word)

    return echo


def settings_of(output: str) -> Settings:
    return Settings.model_validate_json(output.splitlines()[0])


def words_of(output: str) -> str:
    """Help without its frame, on one line."""
    return re.sub(r"[\s│]+", " ", output)


@pytest.mark.parametrize("command", ["serve", "chat", "generate"])
def test_help_shows_every_setting_with_its_description_and_default(runner: CliRunner, command: str) -> None:
    result = runner.invoke(app, [command, "--help"])
    assert result.exit_code == 0
    shown = words_of(result.output)
    for name, field in Settings.model_fields.items():
        if command != "serve" and name in SERVER_ONLY:
            # chat and generate have an --api-key of their own: the one to bring, not those to ask for
            assert name == "api_key" or f"{flag_of(name)} " not in shown
            continue
        assert f"{flag_of(name)} " in shown
        assert field.description is not None and words_of(field.description) in shown
        if default_of(field) is not None:
            assert f"[default: {default_of(field)}]" in shown


def test_without_options_the_settings_are_the_defaults(runner: CliRunner, echo: typer.Typer) -> None:
    assert settings_of(runner.invoke(echo, []).output) == Settings()


def test_options_go_before_the_environment_and_that_before_the_file(
    runner: CliRunner, echo: typer.Typer, tmp_path: Path
) -> None:
    file = tmp_path / "rekindle.toml"
    file.write_text("threads = 1\nport = 1\nmin_tokens = 1\n")
    env = {"REKINDLE_THREADS": "2", "REKINDLE_PORT": "2"}
    result = runner.invoke(echo, ["--config", str(file), "--threads", "3", "--word", "own"], env=env)
    settings = settings_of(result.output)
    assert (settings.threads, settings.port, settings.min_tokens) == (3, 2, 1)
    assert result.output.splitlines()[1] == "own"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threads", "many"], "rekindle: setting threads: expected a valid integer"),
        (["--threads", "0"], "rekindle: setting threads: expected greater than or equal to 1, got '0'"),
        (["--kv-type", "q5_1"], "rekindle: setting kv_type: expected 'f16', 'q8_0' or 'q4_0', got 'q5_1'"),
        (["--port", "70000"], "rekindle: setting port: expected less than or equal to 65535"),
        (["--config", "/no/such/file.toml"], "cannot read the settings file /no/such/file.toml: No such file"),
    ],
)
def test_bad_values_are_refused_in_one_line(
    runner: CliRunner, echo: typer.Typer, arguments: list[str], message: str
) -> None:
    result = runner.invoke(echo, arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert result.stdout == ""


def test_an_unknown_setting_in_a_file_is_refused_with_the_nearest_name(
    runner: CliRunner, echo: typer.Typer, tmp_path: Path
) -> None:
    file = tmp_path / "rekindle.toml"
    file.write_text("thread = 2\n")
    result = runner.invoke(echo, ["--config", str(file)])
    assert result.exit_code == 2
    assert "unknown setting 'thread'; did you mean 'threads'?" in result.stderr


def test_an_unknown_setting_in_the_environment_is_refused_with_the_nearest_name(
    runner: CliRunner, echo: typer.Typer
) -> None:
    result = runner.invoke(echo, [], env={"REKINDLE_CONTEX": "512"})
    assert result.exit_code == 2
    assert "unknown setting 'contex'; did you mean 'context'?" in result.stderr


def test_an_unknown_option_is_refused_with_the_nearest_name(runner: CliRunner) -> None:
    result = runner.invoke(app, ["serve", "--thread", "2"])
    assert result.exit_code == 2
    assert "--threads" in result.stderr


def test_a_file_that_is_not_toml_is_refused(runner: CliRunner, echo: typer.Typer, tmp_path: Path) -> None:
    file = tmp_path / "rekindle.toml"
    file.write_bytes(b"\xff\xfe")
    result = runner.invoke(echo, ["--config", str(file)])
    assert result.exit_code == 2
    assert "is not TOML" in result.stderr
