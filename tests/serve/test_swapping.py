"""Requests that make way and come back, on the built-in model: the same answers, and nothing computed twice."""

from __future__ import annotations

import threading

from tests.serve.conftest import ids

from rekindle.serve.observe import Observer
from rekindle.serve.request import Done, Event, Failed, Generation, Sampling
from rekindle.serve.run import Run
from rekindle.serve.service import Service
from rekindle.settings import Settings


class Swaps(Observer):
    def __init__(self) -> None:
        self.out: list[int] = []  # priorities, in order

    def swapped(self, run: Run) -> None:
        self.out.append(run.priority)


def ask_all(service: Service, prompts: list[list[int]], max_tokens: int, priorities: list[int]) -> list[Done]:
    """All at once; the answers in the order of the prompts."""
    left, done = threading.Semaphore(0), dict[int, Done]()

    def submit(number: int) -> None:
        def sink(event: Event) -> None:
            if isinstance(event, Done):
                done[number] = event
            if isinstance(event, Done | Failed):
                left.release()

        prompt = service.token_prompt(prompts[number])
        greedy = Sampling(temperature=0)
        wish = Generation(
            prompt=prompt, max_tokens=max_tokens, sampling=greedy, ignore_eos=True, priority=priorities[number]
        )
        service.submit(wish, sink)

    def submit_all(_: object) -> None:
        for number in range(len(prompts)):
            submit(number)

    service.run_on_engine(submit_all)  # between two steps, so that none is over before the others have come
    for _ in prompts:
        assert left.acquire(timeout=300)
    return [done[number] for number in range(len(prompts))]


def test_what_does_not_fit_together_is_answered_as_if_alone_with_nothing_computed_twice() -> None:
    prompts = [ids(seed, 100) for seed in range(4)]
    swaps = Swaps()
    settings = Settings(threads=1, store="none", context=400, policy="priority")
    with Service.open(settings, observers=[swaps]) as service:
        together = ask_all(service, prompts, 80, [0, 3, 0, 3])
        assert service.num_computed == 4 * (100 + 79)
        assert swaps.out and set(swaps.out) == {3}, "the less urgent make way"
        service.check_integrity()
        for prompt, answer in zip(prompts, together, strict=True):
            service.clear_cache()
            (alone,) = ask_all(service, [prompt], 80, [0])
            assert alone.tokens == answer.tokens
