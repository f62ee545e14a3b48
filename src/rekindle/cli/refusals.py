"""How a command ends: exit codes, and errors as one line on stderr.

0: it did what was asked. 2: what was asked has no meaning here (an unknown option, a bad setting, an empty prompt).
1: it has, but it failed (no such model, a torn file, a server that can't be reached). 130: interrupted.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterable
from typing import ParamSpec, TypeVar

import typer

from rekindle.errors import InvalidRequest, RekindleError

FAILED, MISUSED, INTERRUPTED = 1, 2, 130

P = ParamSpec("P")
R = TypeVar("R")


def guarded(command: Callable[P, R]) -> Callable[P, R]:
    """Let no RekindleError and no Ctrl-C out of a command as a traceback."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except RekindleError as error:
            complain(str(error))
            raise typer.Exit(exit_code(error)) from None
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:  # the reader of our output has gone, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(FAILED) from None

    return run


def refuse_given(context: typer.Context, options: Iterable[str], reason: str) -> None:
    """Raises InvalidRequest if any of these parameters was given, for it would be ignored."""
    for option in options:
        source = context.get_parameter_source(option)
        if source is not None and source.name == "COMMANDLINE":
            raise InvalidRequest(f"--{option.replace('_', '-')} {reason}", param=option)


def exit_code(error: RekindleError) -> int:
    return MISUSED if isinstance(error, InvalidRequest) else FAILED


def complain(message: str) -> None:
    """One line on stderr, whatever the message holds."""
    typer.echo(f"rekindle: {' '.join(message.split())}", err=True)
