"""What was said before, as the tokens it was said in.

A chat client sends the whole conversation again with each turn. Tokenising an answer's text need not give the tokens that
were generated, and then nothing after the difference could be reused. So the text and tokens of recent sequences are
remembered: a prompt that begins with such a text begins with its tokens, and only the rest is tokenised. The seam must lie
before a special token (the end of a turn), where tokenisers always cut.

The latest prompts are remembered too: to tokenise one again takes longer than all else that a repeated prompt needs.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

from rekindle.reuse.prompt import Chunk
from rekindle.tokens import Tokens

Owner = tuple[bytes, bool, bool]


@dataclass(frozen=True, eq=False)
class Transcript:
    """A prompt and its answer."""

    text: str
    tokens: Tokens
    chunks: tuple[Chunk, ...] = ()  # of the prompt


class Transcripts:
    """The latest sequences, by owner: the tenant's salt, whether a BOS goes before the text, and whether it has chunks.

    Thread-safe.
    """

    def __init__(self, max_entries: int = 256, max_prompts: int = 32) -> None:
        self._max = max_entries
        self._max_prompts = max_prompts
        self._entries: OrderedDict[tuple[Owner, str], Transcript] = OrderedDict()
        self._prompts: OrderedDict[tuple[Owner, str], Tokens] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, owner: Owner, text: str, tokens: Tokens, chunks: tuple[Chunk, ...] = ()) -> None:
        with self._lock:
            self._entries[owner, text] = Transcript(text, tokens, chunks)
            self._entries.move_to_end((owner, text))
            while len(self._entries) > self._max:
                self._entries.popitem(last=False)

    def add_prompt(self, owner: Owner, text: str, tokens: Tokens) -> None:
        with self._lock:
            self._prompts[owner, text] = tokens
            while len(self._prompts) > self._max_prompts:
                self._prompts.popitem(last=False)

    def prompt(self, owner: Owner, text: str) -> Tokens | None:
        """The tokens of a prompt that is remembered with exactly this text."""
        with self._lock:
            tokens = self._prompts.get((owner, text))
            if tokens is not None:
                self._prompts.move_to_end((owner, text))
            return tokens

    def longest(self, owner: Owner, text: str) -> Transcript | None:
        """The longest remembered text that `text` begins with."""
        with self._lock:
            fitting = [t for (whose, known), t in self._entries.items() if whose == owner and text.startswith(known)]
        return max(fitting, key=lambda transcript: len(transcript.text), default=None)

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()
            self._prompts.clear()
