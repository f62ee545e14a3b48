"""The same requests with and without `SimpleKVCache`, on a real model.

    python examples/comparison.py

Each request is a question about one of a few long documents. Without the cache the model reads document and question in
one call. With it, the document's KV comes from the cache (or is computed and cached, at the first question about it), and
the model reads only the question. Every request is served in both ways, and both answer with the same greedy tokens, or
the run ends with an error.

The limit: reading n tokens takes n × 2 × parameters operations and attention on top; putting them back copies n × (bytes
of KV per token) twice. What remains with the cache is reading the question and writing the answer, which both ways do.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from typing import Annotated

import typer
from reading import Answer, Arms, Reader, print_json, progress
from rich.console import Console

from rekindle import SimpleKVCache
from rekindle.model.ember.language import generate_document, generate_questions


@dataclass(frozen=True)
class Request:
    document: list[int]  # token ids
    question: list[int]  # those that follow, up to the answer


def draw_requests(reader: Reader, requests: int, prefixes: int, tokens: int, seed: int) -> list[Request]:
    """Questions about documents, both chosen at random."""
    documents = [generate_document(f"{seed}/{number}", num_tokens=tokens) for number in range(prefixes)]
    questions = [generate_questions(document, seed, count=20) for document in documents]
    rng = random.Random(seed)
    drawn = []
    for _ in range(requests):
        about = rng.randrange(prefixes)
        system = {"role": "system", "content": documents[about].text}
        document = reader.ids([system], to_answer=False)
        prompt = reader.ids([system, {"role": "user", "content": rng.choice(questions[about]).text}])
        assert prompt[: len(document)] == document
        drawn.append(Request(document, prompt[len(document) :]))
    return drawn


def serve(reader: Reader, request: Request, max_tokens: int) -> Answer:
    """Without a cache: all in one call."""
    arrived = time.perf_counter()  # clock on; off after the last token
    return reader.answer(request.document + request.question, None, max_tokens, arrived)


def serve_from(cache: SimpleKVCache, reader: Reader, request: Request, max_tokens: int) -> Answer:
    """With the document's KV from the cache. This is all there is to it."""
    arrived = time.perf_counter()  # clock on; off after the last token
    kv = cache.get_all_layers(request.document, reader.num_layers)
    if kv is None:
        with cache.timed_miss():
            kv = reader.read(request.document)
        cache.cache_all_layers(request.document, kv)
    return reader.answer(request.question, kv, max_tokens, arrived)


def main(
    requests: Annotated[int, typer.Option(min=1, help="How many questions.")] = 100,
    prefixes: Annotated[int, typer.Option(min=1, help="About how many documents.")] = 3,
    tokens: Annotated[int, typer.Option(min=50, max=3900, help="Length of a document.")] = 3000,
    max_tokens: Annotated[int, typer.Option(min=1, max=100, help="Longest answer.")] = 16,
    max_size_gb: Annotated[float, typer.Option(min=1e-6, max=1e6, help="Size of the cache.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of documents, questions and their order.")] = 0,
) -> None:
    """100 requests over 3 prefixes, with and without the cache."""
    reader, cache, arms = Reader(), SimpleKVCache(max_size_gb), Arms.none()
    drawn = draw_requests(reader, requests, prefixes, tokens, seed)
    for request in progress(drawn, "requests"):
        arms.serve(
            lambda request=request: serve(reader, request, max_tokens),  # type: ignore[misc]
            lambda request=request: serve_from(cache, reader, request, max_tokens),  # type: ignore[misc]
        )

    stats = cache.get_stats()
    length = sum(len(request.document) + len(request.question) for request in drawn) // requests
    console = Console(highlight=False, soft_wrap=True)
    console.print(arms.table())
    console.print(f"\n{requests} requests over {prefixes} documents, {length:,} tokens a prompt.")
    console.print(f"Hit rate {stats['hit_rate_percent']:.1f} %: {stats['hits']} hits, {stats['misses']} misses.")
    console.print(f"Answers equal in both ways: {arms.num_equal} of {requests}.\n")
    cache.print_stats(console)
    workload = {"requests": requests, "prefixes": prefixes, "prompt_tokens": length, "max_tokens": max_tokens}
    print_json({"example": "comparison", "workload": workload | {"seed": seed}, **arms.facts(), "stats": stats})


if __name__ == "__main__":
    typer.run(main)
