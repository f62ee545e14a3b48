"""A transformers model that never computes the same KV twice, in eight steps.

    python examples/transformers_cache.py
    python examples/transformers_cache.py --model path/to/a/model --kv kv      # run it twice: the second finds the first

`--model` is any folder that transformers can load a language model and a fast tokenizer from; without it, the built-in
model. Three requests about one document are answered: the first, the same again, and one with another question. For each
the eight steps are shown, with what they found and how long they took:

1. tokenise    2. look up    3. split    4. load    5. prefill, or skip it    6. decode    7. return    8. timings

The limit: reading n tokens takes n × 2 × parameters operations, and attention on top; putting them back copies n × (bytes
of KV per token). What no cache can spare is step 6. Each answer is compared with that of the same model without a cache.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from rekindle.errors import RekindleError
from rekindle.lab.machine import this_machine
from rekindle.model import ember
from rekindle.model.ember.language import generate_document, generate_questions

try:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from rekindle.torch import Cache, Generated, generate
except (ImportError, RekindleError) as error:
    raise SystemExit(f'This example needs PyTorch and transformers: pip install "rekindle[torch]" ({error})') from None


def load(model: Path, dtype: str) -> tuple[Any, Any]:
    """As anybody would: nothing here knows of Rekindle."""
    logging.disable_progress_bar()
    if not (model / "config.json").is_file():
        raise SystemExit(f"--model: expected a folder of a transformers model, got {model}, which has no config.json")
    chosen = dtype if dtype == "auto" else getattr(torch, dtype)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=chosen, local_files_only=True).eval()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return loaded.to(device), AutoTokenizer.from_pretrained(model, local_files_only=True)


def make_prompts(tokenizer: Any, document: str, questions: list[str]) -> list[Any]:
    """Messages if the tokenizer has a chat template, or else text."""
    texts = [f"{document}\n{question}" for question in questions]
    return [[{"role": "user", "content": text}] for text in texts] if tokenizer.chat_template else texts


def kind_of(answer: Generated) -> str:
    """What the request met; a second run on one folder meets the first one's KV."""
    return "cold" if not answer.reused else "hit" if not answer.computed else "hit with suffix"


def steps_of(answer: Generated) -> list[tuple[str, str, float | None]]:
    """Name, what it found, and milliseconds of each of the eight steps."""
    times, plan = answer.timings, answer.plan.as_dict()
    parts = " + ".join(f"{step['stop'] - step['start']} {step['kind']}" for step in plan["steps"])
    prefill = f"{answer.computed} tokens in 1 call" if answer.computed else "skipped: the logits are at hand"
    return [
        ("1 tokenise", f"{answer.prompt_tokens} tokens", times.tokenize_ms),
        ("2 look up", f"{answer.reused} tokens found", times.look_up_ms),
        ("3 split", parts, None),  # timed with the look-up
        ("4 load", f"{answer.reused} tokens", times.load_ms),
        ("5 prefill", prefill, times.prefill_ms),
        ("6 decode", f"{len(answer.tokens)} tokens", times.decode_ms),
        ("7 return", repr(answer.text[:40]), None),
        ("8 timings", f"first token after {times.ttft_ms:.1f} ms", times.total_ms),
    ]


def show(console: Console, answer: Generated, is_equal: bool) -> None:
    table = Table(title=kind_of(answer), title_justify="left")
    table.add_column("step")
    table.add_column("what came of it", overflow="fold")
    table.add_column("ms", justify="right")
    for name, what, milliseconds in steps_of(answer):
        table.add_row(name, what, "" if milliseconds is None else f"{milliseconds:.1f}")
    console.print(table)
    words = "the same" if is_equal else "ANOTHER (two tokens as good as equal?)"
    console.print(f"Without a cache the answer is {words}. Kept in {answer.timings.keep_ms:.1f} ms.\n")


def main(
    model: Annotated[
        Path, typer.Option(help="Folder of a transformers model; default: the built-in one.")
    ] = ember.hf_path(),  # noqa: B008
    kv: Annotated[Path | None, typer.Option(help="Folder for the KV; default: one that is deleted.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto for the weights' own.")] = "float32",
    tokens: Annotated[int, typer.Option(min=50, max=3000, help="About how long the document is.")] = 800,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 16,
    seed: Annotated[int, typer.Option(help="Of the document.")] = 0,
) -> None:
    """Cold, hit and hit with suffix."""
    console = Console(highlight=False)
    document = generate_document(f"{seed}/0", num_tokens=tokens)
    first, other = [each.text for each in generate_questions(document, seed, count=2)][:2]
    loaded, tokenizer = load(model, dtype)
    one, two = make_prompts(tokenizer, document.text, [first, other])
    plain = {first: generate(loaded, tokenizer, one, max_new_tokens=max_new_tokens)}
    plain[other] = generate(loaded, tokenizer, two, max_new_tokens=max_new_tokens)
    facts = []
    with ExitStack() as stack:
        folder = kv or Path(stack.enter_context(TemporaryDirectory()))
        cache = stack.enter_context(Cache(folder))
        cache.engine(loaded, tokenizer)  # made now, so that no request waits for it
        for question, prompt in ((first, one), (first, one), (other, two)):
            answer = generate(loaded, tokenizer, prompt, cache=cache, max_new_tokens=max_new_tokens)
            is_equal = answer.tokens == plain[question].tokens
            show(console, answer, is_equal)
            facts.append(
                {
                    "kind": kind_of(answer),
                    "prompt_tokens": answer.prompt_tokens,
                    "reused": answer.reused,
                    "computed": answer.computed,
                    "model_calls_before_the_first_token": answer.model_calls,
                    "equal": is_equal,
                    "ttft_ms": answer.timings.ttft_ms,
                    "ttft_ms_without_cache": plain[question].timings.ttft_ms,
                    **asdict(answer.timings),
                }
            )
    report = {"example": "transformers_cache", "model": model.name, "dtype": str(loaded.dtype), "requests": facts}
    machine = asdict(this_machine()) | {"torch": torch.__version__, "device": str(loaded.device)}
    typer.echo(json.dumps(report | {"machine": machine}))


if __name__ == "__main__":
    typer.run(main)
