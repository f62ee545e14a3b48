"""`rekindle generate`: one prompt, one answer."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack, closing

import typer

from rekindle.cli.client import first_key
from rekindle.cli.talk import Answer, Answering, Remote, Talker, Wish
from rekindle.errors import InvalidRequest
from rekindle.settings import Settings

STDIN = "-"


def read_prompt(given: str, what: str = "prompt") -> str:
    """The prompt, or what it is called, or stdin if it is `-`. Raises InvalidRequest if there is none."""
    if given == STDIN:
        data = sys.stdin.buffer.read()
        try:
            given = data.decode("utf-8")
        except UnicodeDecodeError:
            raise InvalidRequest(f"the {what} on stdin is not UTF-8 text", param=what) from None
    if not given.strip():
        raise InvalidRequest(f"the {what} is empty: at least one token is needed", param=what)
    return given


def run_generate(
    settings: Settings,
    prompt: str,
    wish: Wish,
    *,
    url: str | None,
    chat: bool | None,
    as_json: bool,
    stats: bool,
    key: str | None = None,
) -> None:
    """Ask a server, or a model opened here, and print the answer as it comes, or all of it as JSON.

    Without `chat` the prompt is a message if the model has a chat template; a server's model is taken to have one.
    """
    text = read_prompt(prompt)
    with ExitStack() as stack:
        talker: Talker
        if url is not None:
            talker, as_message = Remote(url, key=key or first_key(settings)), chat is not False
        else:
            from rekindle.cli.talk_local import Local  # here: asking a server needs no model library
            from rekindle.serve.service import Service

            service = stack.enter_context(closing(Service.open(settings)))
            talker, as_message = Local(service), service.model.template is not None if chat is None else chat
        _print(_answering(talker, text, wish, as_message), as_json=as_json, stats=stats)


def _answering(talker: Talker, text: str, wish: Wish, as_message: bool) -> Answering:
    return talker.chat([{"role": "user", "content": text}], wish) if as_message else talker.complete(text, wish)


def _print(answering: Answering, *, as_json: bool, stats: bool) -> None:
    with closing(answering):
        for part in answering:
            if isinstance(part, Answer):
                typer.echo(json.dumps(part.as_dict()) if as_json else "")
                if stats:
                    typer.echo(part.summary, err=True)
            elif not as_json:
                typer.echo(part, nl=False)
