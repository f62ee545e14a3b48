"""An agent that tries several next steps from one growing context, with all layers in `SimpleKVCache`.

    python examples/multilayer.py

In every round the agent tries 5 continuations (questions) of the same context, keeps one with its answer, and learns new
records, which make the next round's context. So the context of a round is asked for 5 times, and it begins with the
context of the round before:

    round 1   | records                                 | + question 1 … 5
    round 2   | records | question, answer, new records | + question 1 … 5
              '-- longest_prefix --'-- read ------------'

A request finds its whole context in the cache (a hit), or goes on from the longest beginning that is there, or reads all
of it. `get_all_layers` counts one request, however many layers there are; this table counts requests and layers apart,
because a cache that counts each layer of a hit but only the first missing layer of a miss reports a higher rate than its
users see. Every request is also served without the cache, by reading the whole prompt in one call, and the answers must
be the same greedy tokens, or the run ends with an error.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Sequence
from typing import Annotated

import typer
from reading import KV, Answer, Arms, Message, Reader, print_json, progress, right_aligned
from rich.console import Console

from rekindle import SimpleKVCache
from rekindle.model.ember.language import generate_document, generate_questions

WHOLE, BEGINNING, NOTHING = "the whole context", "its beginning", "nothing"


class Agent:
    """Serves requests in both ways, and counts what the cache had."""

    def __init__(self, reader: Reader, cache: SimpleKVCache, max_tokens: int) -> None:
        self.reader = reader
        self.cache = cache
        self.max_tokens = max_tokens
        self.arms = Arms.none()
        self.found: Counter[str] = Counter()  # requests
        self.prompt_tokens = 0
        self.read_tokens = 0  # with the cache

    def try_step(self, messages: Sequence[Message], question: str) -> str:
        """The answer to a question that follows the messages."""
        context = self.reader.ids(messages, to_answer=False)
        prompt = self.reader.ids([*messages, {"role": "user", "content": question}])
        assert prompt[: len(context)] == context
        self.prompt_tokens += len(prompt)
        answer = self.arms.serve(
            lambda: self._serve(prompt),
            lambda: self._serve_from_cache(context, prompt[len(context) :]),
        )
        return self.reader.text(answer)

    def _serve(self, prompt: list[int]) -> Answer:
        arrived = time.perf_counter()  # clock on; off after the last token
        return self.reader.answer(prompt, None, self.max_tokens, arrived)

    def _serve_from_cache(self, context: list[int], rest: list[int]) -> Answer:
        arrived = time.perf_counter()  # clock on; off after the last token
        kv = self.cache.get_all_layers(context, self.reader.num_layers)
        if kv is None:
            kv = self._read(context)
        else:
            self.found[WHOLE] += 1
        self.read_tokens += len(rest)
        return self.reader.answer(rest, kv, self.max_tokens, arrived)

    def _read(self, context: list[int]) -> KV:
        """Compute the context's KV from the longest beginning that is cached, and cache it."""
        cache, num_layers = self.cache, self.reader.num_layers
        with cache.timed_miss():
            known = cache.longest_prefix(context, num_layers=num_layers)
            start = cache.get_all_layers(known, num_layers) if known else None
            length = len(known) if start else 0
            kv = self.reader.read(context[length:], start)
        cache.cache_all_layers(context, kv)
        self.found[BEGINNING if start else NOTHING] += 1
        self.read_tokens += len(context) - length
        return kv


def main(
    continuations: Annotated[int, typer.Option(min=1, help="Continuations tried in a round.")] = 5,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds.")] = 10,
    tokens: Annotated[int, typer.Option(min=50, max=3000, help="Length of the first context.")] = 2500,
    new_tokens: Annotated[int, typer.Option(min=20, help="New records in a round.")] = 100,
    max_tokens: Annotated[int, typer.Option(min=1, max=100, help="Longest answer.")] = 16,
    max_size_gb: Annotated[float, typer.Option(min=1e-6, max=1e6, help="Size of the cache.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of records and questions.")] = 0,
) -> None:
    """5 continuations × 10 rounds, with and without the cache."""
    agent = Agent(Reader(), SimpleKVCache(max_size_gb), max_tokens)
    document = generate_document(f"{seed}/0", num_tokens=tokens)
    questions = [each.text for each in generate_questions(document, seed, count=20)]
    rng = random.Random(seed)
    messages: list[Message] = [{"role": "system", "content": document.text}]
    steps = [(number, step) for number in range(1, rounds + 1) for step in range(1, continuations + 1)]
    for number, step in progress(steps, f"{rounds} rounds × {continuations}"):
        question = rng.choice(questions)
        answer = agent.try_step(messages, question)
        if step == continuations:  # the last one tried is kept
            news = generate_document(f"{seed}/{number}", num_tokens=new_tokens).text
            messages += [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
                {"role": "user", "content": news},
            ]
    workload = {"continuations": continuations, "rounds": rounds, "max_tokens": max_tokens, "seed": seed}
    report(agent, len(steps), workload)


def report(agent: Agent, asked: int, workload: dict[str, int]) -> None:
    """The tables, and a line for machines."""
    num_layers = agent.reader.num_layers
    found = right_aligned("found in the cache", "requests", "layers")
    for name in (WHOLE, BEGINNING, NOTHING):
        count = agent.found[name]
        requests = f"{count} of {asked} ({100 * count / asked:.1f} %)"
        found.add_row(name, requests, f"{count * num_layers} of {asked * num_layers}")
    times, read, whole = agent.arms.table(), agent.read_tokens, agent.prompt_tokens
    times.add_row("tokens read", f"{whole:,}", f"{read:,}", f"{whole / read:.1f} ×")
    console = Console(highlight=False, soft_wrap=True)
    console.print(found)
    console.print()
    console.print(times)
    console.print(f"\nAnswers equal in both ways: {agent.arms.num_equal} of {asked}.")
    console.print("A request that misses asks once more, for the beginning; the cache itself counts both:\n")
    agent.cache.print_stats(console)
    whole_hits, continued = agent.found[WHOLE], agent.found[BEGINNING]
    print_json(
        {
            "example": "multilayer",
            "workload": workload | {"prompt_tokens": whole // asked, "layers": num_layers},
            **agent.arms.facts(),
            "requests": {"asked": asked, "found": whole_hits, "continued": continued},
            "layers": {name: count * num_layers for name, count in (("asked", asked), ("found", whole_hits))},
            "tokens": {"in_prompts": whole, "read": read},
            "stats": agent.cache.get_stats(),
        }
    )


if __name__ == "__main__":
    typer.run(main)
