"""Made-up traces of different characters, to judge eviction policies by more than one load. Seeded, so always the same."""

from __future__ import annotations

import heapq
from bisect import bisect
from collections.abc import Callable, Iterator
from itertools import accumulate, count
from random import Random

from rekindle.lab.trace_file import Trace, make_trace

Chain = list[int]
Turns = Iterator[tuple[float, Chain]]  # each prompt of a conversation, with the time until the next


class _Maker:
    """Draws chains; every new block has an id of its own."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self._ids = count()

    def blocks(self, least: int, most: int) -> Chain:
        return [next(self._ids) for _ in range(self.random.randint(least, most))]

    def zipf(self, items: list[Chain], exponent: float) -> Callable[[], Chain]:
        """Draws the n-th item with a chance that falls as n to the exponent."""
        edges = list(accumulate(1 / (rank + 1) ** exponent for rank in range(len(items))))
        return lambda: items[bisect(edges, self.random.random() * edges[-1])]

    def chat(self, head: Chain, go_on: float, pause: float) -> Turns:
        chain = head + self.blocks(2, 20)
        while True:
            yield self.random.expovariate(1 / pause), chain + self.blocks(1, 1)
            if self.random.random() > go_on:
                return
            chain = chain + self.blocks(1, 5)

    def interleave(self, num_requests: int, arrivals: float, begin: Callable[[], Turns]) -> list[Chain]:
        """Conversations that begin at this rate and go on side by side, in the order of their requests."""
        waiting: list[tuple[float, int, Turns]] = []
        chains: list[Chain] = []
        next_arrival = 0.0
        while len(chains) < num_requests:
            while not waiting or next_arrival <= waiting[0][0]:
                heapq.heappush(waiting, (next_arrival, next(self._ids), begin()))
                next_arrival += self.random.expovariate(arrivals)
            now, number, turns = heapq.heappop(waiting)
            turn = next(turns, None)
            if turn is not None:
                chains.append(turn[1])
                heapq.heappush(waiting, (now + turn[0], number, turns))
        return chains


def chats(make: _Maker, num_requests: int) -> list[Chain]:
    """Conversations behind one system prompt, a minute between turns."""
    head = make.blocks(2, 2)
    return make.interleave(num_requests, 1.0, lambda: make.chat(head, 0.75, 60))


def agents(make: _Maker, num_requests: int) -> list[Chain]:
    """Long transcripts that grow quickly, behind one of three system prompts."""
    heads = [make.blocks(10, 10) for _ in range(3)]
    return make.interleave(num_requests, 0.05, lambda: make.chat(make.random.choice(heads), 0.97, 20))


def documents(make: _Maker, num_requests: int) -> list[Chain]:
    """Questions about documents of which few are asked for often."""
    head = make.blocks(2, 2)
    draw = make.zipf([make.blocks(4, 30) for _ in range(2_000)], 1.0)
    return [head + draw() + make.blocks(1, 1) for _ in range(num_requests)]


def scans(make: _Maker, num_requests: int) -> list[Chain]:
    """Chats, and between them long prompts that never come again."""
    result = []
    for chain in chats(make, num_requests):
        result.append(chain)
        if make.random.random() < 0.3:
            result.append(make.blocks(20, 80))
    return result[:num_requests]


def system_prompts(make: _Maker, num_requests: int) -> list[Chain]:
    """Single requests behind one of 500 system prompts."""
    draw = make.zipf([make.blocks(5, 40) for _ in range(500)], 0.8)
    return [draw() + make.blocks(1, 5) for _ in range(num_requests)]


def shifting(make: _Maker, num_requests: int) -> list[Chain]:
    """Popular documents, half of which are replaced ten times, while the others change ranks."""
    documents = [make.blocks(3, 20) for _ in range(300)]
    draw = make.zipf(documents, 0.9)
    result = []
    for number in range(num_requests):
        if number % max(1, num_requests // 10) == 0:
            make.random.shuffle(documents)
            documents[:150] = [make.blocks(3, 20) for _ in range(150)]
        result.append(draw() + make.blocks(1, 1))
    return result


def news(make: _Maker, num_requests: int) -> list[Chain]:
    """New documents come all the time and are asked for while they are new."""
    documents: list[Chain] = []
    result = []
    for number in range(num_requests):
        if number % 5 == 0:
            documents.append(make.blocks(5, 20))
        back = min(len(documents) - 1, int(make.random.expovariate(1 / 60)))
        result.append(documents[-1 - back] + make.blocks(1, 1))
    return result


def unique(make: _Maker, num_requests: int) -> list[Chain]:
    """Nothing is ever asked for twice."""
    return [make.blocks(1, 40) for _ in range(num_requests)]


def loop(make: _Maker, num_requests: int) -> list[Chain]:
    """Three hundred prompts in turn, for ever: LRU finds nothing unless all of them fit."""
    prompts = [make.blocks(10, 20) for _ in range(300)]
    return [prompts[number % 300] for number in range(num_requests)]


def branches(make: _Maker, num_requests: int) -> list[Chain]:
    """Search among lines of thought: each request branches off near the end of a recent one."""
    recent = [make.blocks(1, 1)]
    for _ in range(num_requests):
        line = make.random.choice(recent[-50:])
        cut = make.random.randint(max(1, len(line) - 6), len(line))
        recent.append(make.blocks(8, 8) if make.random.random() < 0.01 else line[:cut] + make.blocks(1, 4))
    return recent[1:]


def recent(make: _Maker, num_requests: int) -> list[Chain]:
    """The more recently a prompt was used the likelier it is used again, and nothing else matters: made for LRU."""
    stack: list[Chain] = []
    result = []
    for _ in range(num_requests):
        again = stack and make.random.random() > 0.2
        depth = min(len(stack), int(make.random.paretovariate(0.6)))
        prompt = stack.pop(-depth) if again else make.blocks(5, 20)
        stack.append(prompt)
        result.append(prompt)
    return result


def phases(make: _Maker, num_requests: int) -> list[Chain]:
    """One load after the other."""
    parts = (chats, documents, loop, agents, system_prompts)
    return [chain for part in parts for chain in part(make, num_requests // len(parts))]


WORKLOADS: dict[str, Callable[[_Maker, int], list[Chain]]] = {
    each.__name__: each
    for each in (
        chats, agents, documents, scans, system_prompts, shifting, news, unique, loop, branches, recent, phases,
    )
}  # fmt: skip


def make_workload(name: str, num_requests: int, seed: int = 0) -> Trace:
    """A trace by the name of its character."""
    return make_trace(name, [(chain, None) for chain in WORKLOADS[name](_Maker(seed), num_requests)])
