"""The generated parts of README.md and docs/metrics.md: commands, settings, metrics and measured figures.

    python -m rekindle.cli.reference README.md              commands and settings
    python -m rekindle.cli.reference docs/metrics.md        metrics
    rekindle demo --rounds 9 --json > demo.json
    python -m rekindle.cli.reference README.md demo.json    the measured table too

A generated part stands between `<!-- NAME -->` and `<!-- /NAME -->`; a test compares it with what would be written now.
"""

from __future__ import annotations

import json
import re
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from rekindle.cli.app import app
from rekindle.cli.options import default_of, flag_of, values_of
from rekindle.serve.metric_list import metrics_table
from rekindle.settings import Settings


def commands_table() -> str:
    """One row for each command: how it is called, and the first sentence of its help."""
    return _markdown(("command", "what it does"), _command_rows(typer.main.get_command(app), "rekindle"))


def _command_rows(command: Any, path: str) -> Iterable[tuple[str, str]]:
    for name, child in command.commands.items():
        if hasattr(child, "commands") and not child.invoke_without_command:
            yield from _command_rows(child, f"{path} {name}")
            continue
        arguments = "".join(f" {each.name.upper()}" for each in child.params if each.param_type_name == "argument")
        yield f"`{path} {name}{arguments}`", re.split(r"(?<=\.)\s", child.help.strip())[0]
        if hasattr(child, "commands"):
            yield from _command_rows(child, f"{path} {name}")


def settings_table() -> str:
    """One row for each setting, from its field."""
    rows = [
        (f"`{flag_of(name)}`", f"`{values_of(field)}`".replace("|", "\\|"), default_of(field) or "", field.description)
        for name, field in Settings.model_fields.items()
    ]
    return _markdown(("option", "value", "default", "meaning"), rows)


def measured_table(report: Mapping[str, Any]) -> str:
    """The figures of `rekindle demo --json` and their conditions."""
    headings = (
        "request",
        "prompt tokens",
        "reused",
        "computed",
        "model calls before the first token",
        "TTFT",
        "TTFT without reuse",
    )
    rows = [
        (
            step["step"],
            str(step["prompt_tokens"]),
            str(step["reused_tokens"]),
            str(step["computed_tokens"]),
            str(step["calls_before_first_token"]),
            f"{step['ttft_ms']:.1f} ms",
            f"{step['ttft_ms_without_reuse']:.1f} ms",
        )
        for step in report["steps"]
    ]
    machine = report["machine"]
    conditions = (
        f"{report['setup'][:1].upper()}{report['setup'][1:]}; {machine['processor']}, {machine['cores']} cores, "
        f"{machine['memory_bytes'] / (1 << 30):.0f} GiB, {machine['system']}, Python {machine['python']}, "
        f"llama-cpp-python {machine['llama_cpp']}; over HTTP on one machine; times are medians of {report['rounds']} "
        "rounds, from the request's arrival at the server to its first token."
    )
    return f"{_markdown(headings, rows)}\n\n{textwrap.fill(conditions, 120)}"


def replace_part(text: str, name: str, part: str) -> str:
    """`text` with the generated part `name` exchanged."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"there are no marks <!-- {name} --> and <!-- /{name} -->")
    return pattern.sub(lambda match: f"{match[1]}{part}\n{match[2]}", text)


def _markdown(headings: Sequence[str], rows: Iterable[Sequence[str | None]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(cell or '' for cell in line)} |" for line in lines)


def main(readme: Path, figures: Path | None = None) -> None:
    """Write the parts that the file has into it."""
    text = readme.read_text("utf-8")
    for name, table in {"commands": commands_table, "settings": settings_table, "metrics": metrics_table}.items():
        if f"<!-- {name} -->" in text:
            text = replace_part(text, name, table())
    if figures is not None:
        text = replace_part(text, "measured", measured_table(json.loads(figures.read_text("utf-8"))))
    readme.write_text(text, "utf-8")


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))
