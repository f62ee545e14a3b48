"""Command line options made from `Settings`.

`with_settings` takes a command whose first parameter is `settings: Settings` and gives the command line one option per
field in its place, and `--config`. What an option accepts, its default and its help come from the field; its value goes
to `Settings.load` as text, so that file, environment and flags are checked by the same code and refused in the same
words.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic import ByteSize
from pydantic.fields import FieldInfo
from rich.markup import escape

from rekindle.settings import PREFIX, SEVERAL, Settings

SERVER_ONLY = frozenset(  # of no use to a command that opens no socket
    {
        "max_sessions",
        "session_idle_seconds",
        "session_policy",
        "session_retention",
        "session_slides",
        "session_pause_seconds",
        "session_ttl_seconds",
        "session_files",
        "host",
        "port",
        "max_body_bytes",
        "max_responses",
        "response_ttl_seconds",
        "api_key",
        "api_key_file",
        "max_per_key",
        "request_timeout",
        "drain_seconds",
        "stall_seconds",
        "cors_origin",
        "allowed_host",
        "log_level",
        "log_format",
    }
)
PANEL = "Settings"


def with_settings(*, leave_out: Collection[str] = ()) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Replace a command's first parameter by options for all settings but those left out."""
    names = [name for name in Settings.model_fields if name not in leave_out]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        _, *own = inspect.signature(command, eval_str=True).parameters.values()
        parameters = [*own, *(_parameter(name, Settings.model_fields[name]) for name in names), _CONFIG]

        def run(**given: Any) -> None:
            flags = {name: given.pop(name) or None if name in SEVERAL else given.pop(name) for name in names}
            command(Settings.load(given.pop("config"), **flags), **given)

        run.__name__, run.__doc__, run.__module__ = command.__name__, command.__doc__, command.__module__
        keyword = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
        run.__signature__ = inspect.Signature(keyword)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in keyword}
        return run

    return decorate


def flag_of(name: str) -> str:
    """`max_running` is `--max-running` on the command line."""
    return "--" + name.replace("_", "-")


def variable_of(name: str) -> str:
    """`max_running` is `REKINDLE_MAX_RUNNING` in the environment."""
    return PREFIX + name.upper()


def default_of(field: FieldInfo) -> str | None:
    """The default as text; None where the description says what happens without a value."""
    if isinstance(field.default, ByteSize):
        return field.default.human_readable(separator="")
    return None if field.default in (None, ()) else str(field.default)


def values_of(field: FieldInfo) -> str:
    """What a field accepts, in a word or a list of choices."""
    inner = _inner_type(field)
    if get_origin(inner) is Literal:
        return "|".join(str(value) for value in get_args(inner))
    return {int: "INTEGER", float: "NUMBER", bool: "true|false", ByteSize: "SIZE"}.get(inner, "TEXT")


def help_of(field: FieldInfo) -> str:
    """The field's description and its default, as rich markup."""
    assert field.description, "every setting has a description"
    default = default_of(field)
    return escape(field.description) + ("" if default is None else escape(f" [default: {default}]"))


def _inner_type(field: FieldInfo) -> Any:
    """The type without `| None`."""
    arguments = [each for each in get_args(field.annotation) if each is not type(None)]
    is_optional = type(None) in get_args(field.annotation)
    return arguments[0] if is_optional and len(arguments) == 1 else field.annotation


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    flags: Iterable[str] = (flag_of(name), "-m") if name == "model" else (flag_of(name),)
    option = typer.Option(
        *flags, help=help_of(field), metavar=values_of(field), show_default=False, rich_help_panel=PANEL
    )
    return _keyword(name, list[str] | None if name in SEVERAL else str | None, option)


def _keyword(name: str, kind: Any, option: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, option])


_CONFIG = _keyword(
    "config",
    Path | None,
    typer.Option(
        help=f"TOML file of settings; the environment ({PREFIX}THREADS=2) goes before it, options before both",
        metavar="FILE",
        show_default=False,
        rich_help_panel=PANEL,
    ),
)
