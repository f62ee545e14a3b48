"""`rekindle generate`: one prompt, one answer."""

from __future__ import annotations

import json
import sys
from contextlib import closing

import typer

from rekindle.cli.talk import Answer, Answering, Local, Wish
from rekindle.errors import InvalidRequest
from rekindle.serve.service import Service
from rekindle.settings import Settings

STDIN = "-"


def read_prompt(given: str) -> str:
    """The prompt, or stdin if it is `-`. Raises InvalidRequest if there is none."""
    if given == STDIN:
        data = sys.stdin.buffer.read()
        try:
            given = data.decode("utf-8")
        except UnicodeDecodeError:
            raise InvalidRequest("the prompt on stdin is not UTF-8 text", param="prompt") from None
    if not given.strip():
        raise InvalidRequest("the prompt is empty: at least one token is needed", param="prompt")
    return given


def run_generate(settings: Settings, prompt: str, wish: Wish, *, chat: bool | None, as_json: bool, stats: bool) -> None:
    """Open a model and print its answer as it comes, or all of it as JSON."""
    text = read_prompt(prompt)
    with closing(Service.open(settings)) as service, closing(_answering(service, text, wish, chat)) as answering:
        for part in answering:
            if isinstance(part, Answer):
                typer.echo(json.dumps(part.as_dict()) if as_json else "")
                if stats:
                    typer.echo(part.summary, err=True)
            elif not as_json:
                typer.echo(part, nl=False)


def _answering(service: Service, text: str, wish: Wish, chat: bool | None) -> Answering:
    """As a message if asked to, or if nothing was asked and the model has a chat template."""
    talker = Local(service)
    if chat is False or (chat is None and service.model.template is None):
        return talker.complete(text, wish)
    return talker.chat([{"role": "user", "content": text}], wish)
