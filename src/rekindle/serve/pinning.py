"""The pins of a service: whose each is, and those that come with an answer.

The store knows what a pin keeps; here stands which salt it was made under, so that tenants see and end their own pins
alone, and which pins belong together. An answer that is to be pinned has two: its prompt's, made before anything is
computed, so that a refusal costs nothing; and that of prompt and answer together, which the next turn begins with. The
second is ended with the first, whose id the client gets.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from dataclasses import replace

import numpy as np

from rekindle.errors import InvalidRequest
from rekindle.kv.pins import Pin
from rekindle.kv.store import Store
from rekindle.reuse.prompt import Prompt
from rekindle.serve.request import Done, Event, Failed, Generation, Sink
from rekindle.tokens import as_tokens


class Pinning:
    """Thread-safe."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._salts: dict[str, bytes] = {}  # of pins that may have ended meanwhile
        self._answers: dict[str, set[str]] = {}  # a prompt's pin -> those of its answers
        self._lock = threading.Lock()

    def pin(self, prompt: Prompt, seconds: float, *, name: str | None = None) -> Pin:
        """Keep a prompt's KV for so long, or for longer than before. Raises InvalidRequest."""
        with self._lock:  # who lists pins meanwhile would take the salt for that of one that has ended
            pin = self._store.pin(prompt.tokens, salt=prompt.salt, ttl_seconds=seconds, name=name)
            self._salts[pin.id] = prompt.salt
        return pin

    def unpin(self, pin_id: str, owner: bytes = b"") -> bool:
        """End a pin of a salt that begins with `owner`, and those that came with it; False if there is none."""
        if not any(pin.id == pin_id for pin in self.all(owner)):
            return False
        with self._lock:
            answers = self._answers.pop(pin_id, set())
        for each in answers:
            self._store.unpin(each)
        return self._store.unpin(pin_id)

    def all(self, owner: bytes = b"") -> list[Pin]:
        """Pins of salts that begin with `owner`; which end first, first."""
        with self._lock:
            pins = self._store.pins()
            known = {pin.id for pin in pins}
            for ended in [each for each in self._salts if each not in known]:
                self._salts.pop(ended)
                self._answers.pop(ended, None)
            return [pin for pin in pins if self._salts.get(pin.id, b"").startswith(owner)]

    def view(self, pin: Pin) -> Pin:
        """A pin as it is now, or as it was if it has ended."""
        return next((each for each in self._store.pins() if each.id == pin.id), pin)

    def pin_answer(self, pin: Pin, prompt: Prompt, done: Done, seconds: float) -> None:
        """Pin what the next turn begins with, together with the prompt's pin. Raises InvalidRequest."""
        tokens = np.concatenate([prompt.tokens, as_tokens(done.tokens)])[: done.kept]
        if len(tokens) > len(prompt):
            answer = self.pin(replace(prompt, tokens=tokens, text=None), seconds, name=pin.name)
            with self._lock:
                self._answers.setdefault(pin.id, set()).add(answer.id)

    def watch(self, generation: Generation, sink: Sink) -> Watch:
        """Pin what a generation asks to be pinned. Raises InvalidRequest."""
        return Watch(self, generation, sink)


class Watch:
    """A sink that pins a generation's prompt at once and its answer when it has come, and says so with its end."""

    def __init__(self, pinning: Pinning, generation: Generation, sink: Sink) -> None:
        """Raises InvalidRequest if the prompt can't be pinned."""
        assert generation.pin_seconds is not None
        before = {pin.id for pin in pinning.all()}
        self._pinning = pinning
        self._prompt = generation.prompt
        self._seconds = generation.pin_seconds
        self._sink = sink
        self._pin = pinning.pin(self._prompt, self._seconds)
        self._is_new = self._pin.id not in before

    def __call__(self, event: Event) -> None:
        if isinstance(event, Done):
            event = self._ended(event)
        elif isinstance(event, Failed):
            self.undo()
        self._sink(event)

    def _ended(self, done: Done) -> Done:
        if done.reason == "cancelled":
            self.undo()
            return done
        with suppress(InvalidRequest):  # no more may be pinned: the prompt is, and the answer was promised to nobody
            self._pinning.pin_answer(self._pin, self._prompt, done, self._seconds)
        return replace(done, pin=self._pinning.view(self._pin))

    def undo(self) -> None:
        """Nobody will hear of the pin that was made for this."""
        if self._is_new:
            self._pinning.unpin(self._pin.id)
