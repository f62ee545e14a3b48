"""`rekindle live`: the commands, their arguments and their help. What they do is in `live_talk.py` beside this."""

from __future__ import annotations

from typing import Annotated

import typer

from rekindle.cli.refusals import guarded
from rekindle.errors import InvalidRequest

live = typer.Typer(
    help="A live session of a running server, in one terminal: what is typed is read while it is typed. "
    "The words reset, swap NAME and quit are commands; Ctrl-C interrupts an answer.",
    invoke_without_command=True,
)

Host = Annotated[str, typer.Option(help="of the server")]
Port = Annotated[int, typer.Option(help="of the server", min=1, max=65535)]
Url = Annotated[str | None, typer.Option(help="of the server, instead of host and port; https:// for TLS")]
SessionName = Annotated[str, typer.Option("--session", help="which of the server's sessions; it is made if need be")]
Retries = Annotated[
    int,
    typer.Option(help="attempts to come back when the connection breaks, after 1, 2, 4, 8, 10, 10 … seconds", min=0),
]
Key = Annotated[str | None, typer.Option("--api-key", help="for that server; default: REKINDLE_API_KEY")]
MaxTokens = Annotated[int | None, typer.Option(help="longest answer in tokens; default: until the end of turn", min=1)]
Temperature = Annotated[float, typer.Option(help="0 for the most probable token each time", min=0, max=100)]
Contexts = Annotated[
    list[str] | None,
    typer.Option(
        "--context",
        help="NAME=INSTRUCTIONS: a context to swap to, made unless the session has it; main is the one it begins with; "
        "may be given several times",
    ),
]


@live.callback()
@guarded
def both(
    typed: typer.Context,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    url: Url = None,
    session: SessionName = "default",
    context: Contexts = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = 0.0,
    max_retries: Retries = 10,
    api_key: Key = None,
) -> None:
    """Talk in one terminal; in and out are for two."""
    if typed.invoked_subcommand is not None:
        _refuse_options(typed, typed.invoked_subcommand)
        return
    from rekindle.cli.live_line import Address
    from rekindle.cli.live_talk import Wish, talk

    wish = Wish(max_tokens=max_tokens, temperature=temperature, contexts=context or ())
    talk(Address.of(host, port, url, session, api_key), max_retries, wish)


@live.command("in")
@guarded
def live_in(
    host: Host = "127.0.0.1",
    port: Port = 8000,
    url: Url = None,
    session: SessionName = "default",
    context: Contexts = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = 0.0,
    max_retries: Retries = 10,
    api_key: Key = None,
) -> None:
    """Send each line to the session. The words reset, swap NAME and quit are commands."""
    from rekindle.cli.live_line import Address
    from rekindle.cli.live_talk import Wish, speak

    wish = Wish(max_tokens=max_tokens, temperature=temperature, contexts=context or ())
    speak(Address.of(host, port, url, session, api_key), max_retries, wish)


@live.command("out")
@guarded
def live_out(
    host: Host = "127.0.0.1",
    port: Port = 8000,
    url: Url = None,
    session: SessionName = "default",
    max_retries: Retries = 10,
    api_key: Key = None,
) -> None:
    """Show what happens in the session, until Ctrl-C. Nothing is lost when the connection breaks."""
    from rekindle.cli.live_line import Address
    from rekindle.cli.live_talk import watch

    watch(Address.of(host, port, url, session, api_key), max_retries)


def _refuse_options(typed: typer.Context, command: str) -> None:
    """An option before the command would be read by nobody. Raises InvalidRequest."""
    for name in typed.params:
        source = typed.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            flag = "--" + name.replace("_", "-")
            raise InvalidRequest(f"{flag} goes behind {command!r}: rekindle live {command} {flag} …")
