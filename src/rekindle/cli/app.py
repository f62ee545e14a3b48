"""The commands of `rekindle`, their arguments and their help. What they do is in the modules beside this one.

Those modules are imported when their command runs, so that `rekindle --help` needs no model library and is instant.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from rekindle.cli.cache import cache
from rekindle.cli.lab_commands import lab
from rekindle.cli.live import live
from rekindle.cli.options import SERVER_ONLY, with_settings
from rekindle.cli.refusals import FAILED, guarded
from rekindle.settings import Settings

app = typer.Typer(
    name="rekindle",
    help="An LLM server and library that never computes the same KV twice.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(cache, name="cache")
app.add_typer(live, name="live")
app.add_typer(lab, name="lab")

MaxTokens = Annotated[int | None, typer.Option(help="longest answer in tokens; default: until the end of turn")]
Temperature = Annotated[float, typer.Option(help="0 for the most probable token each time")]
Key = Annotated[str | None, typer.Option(help="for that server; default: REKINDLE_API_KEY")]


@app.command()
@guarded
@with_settings()
def serve(settings: Settings) -> None:
    """Serve a model over HTTP and WebSockets: OpenAI's APIs, live sessions, /generate, /cache, /metrics. Ctrl-C ends it."""
    from rekindle.cli.serve import run_server

    run_server(settings)


@app.command()
@guarded
@with_settings(leave_out=SERVER_ONLY)
def chat(
    settings: Settings,
    url: Annotated[
        str | None, typer.Option(help="talk to a running server; the settings below then have no effect")
    ] = None,
    api_key: Key = None,
    system: Annotated[str | None, typer.Option(help="instructions to begin with")] = None,
    file: Annotated[list[Path] | None, typer.Option(help="text file to talk about; may be given several times")] = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = 0.0,
) -> None:
    """Talk with a model. Ctrl-C interrupts an answer, Ctrl-D or /quit ends. Lines may also be piped in."""
    from rekindle.cli.chat import run_chat
    from rekindle.cli.talk import Wish

    wish = Wish(max_tokens=max_tokens, temperature=temperature)
    if run_chat(settings, wish, url=url, key=api_key, system=system, files=file or ()):
        raise typer.Exit(FAILED)


@app.command()
@guarded
@with_settings(leave_out=SERVER_ONLY)
def generate(
    settings: Settings,
    prompt: Annotated[str, typer.Argument(help="what to answer; - reads it from stdin")],
    url: Annotated[
        str | None, typer.Option(help="ask a running server; the settings below then have no effect")
    ] = None,
    api_key: Key = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = 0.0,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--raw",
            help="as a user's message, or as text to go on with; default: a message if the model has a chat template",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object: text, usage, timings, plan")] = False,
    stats: Annotated[bool, typer.Option("--stats", help="say on stderr what was reused and how long it took")] = False,
) -> None:
    """Answer one prompt."""
    from rekindle.cli.generate import run_generate
    from rekindle.cli.talk import Wish

    wish = Wish(max_tokens=max_tokens, temperature=temperature)
    run_generate(settings, prompt, wish, url=url, key=api_key, chat=chat, as_json=as_json, stats=stats)


@app.command()
@guarded
def info(
    model: Annotated[str, typer.Argument(help="builtin, a path to a .gguf file, or hf:owner/repo\\[:file]")],
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Describe a model: size, KV per token, and which kinds of reuse it allows."""
    import json

    from rekindle.cli.info import print_info, read_info

    facts = read_info(model)
    if as_json:
        typer.echo(json.dumps(facts.as_dict()))
    else:
        print_info(facts, Console())


@app.command()
@guarded
def demo(
    url: Annotated[str | None, typer.Option(help="a running server; default: one is started for the tour")] = None,
    api_key: Key = None,
    rounds: Annotated[int, typer.Option(help="times are medians of so many rounds", min=1)] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object with all figures")] = False,
) -> None:
    """A short tour over HTTP: cold, repeated, shared prefix, second turn. Fails if anything was computed twice."""
    from rekindle.cli.demo import run_demo

    if not run_demo(url, rounds=rounds, as_json=as_json, key=api_key):
        raise typer.Exit(FAILED)


@app.command()
@guarded
def version() -> None:
    """Print the versions of Rekindle and of what it computes with."""
    _print_versions(True)


def _print_versions(wanted: bool) -> None:
    """For the command, and for the option that people try first."""
    if not wanted:
        return
    import platform
    from importlib.metadata import version as version_of

    import rekindle

    typer.echo(f"rekindle {rekindle.__version__}")
    typer.echo(f"llama-cpp-python {version_of('llama-cpp-python')}, Python {platform.python_version()}")
    raise typer.Exit


@app.callback()
def whole(
    version: Annotated[
        bool, typer.Option("--version", help="print versions and end", callback=_print_versions, is_eager=True)
    ] = False,
) -> None:
    """Options of the command itself; what it is for says `app`."""
