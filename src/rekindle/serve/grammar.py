"""Answers that must be JSON of a schema, through llguidance: it says which tokens may come next."""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Mapping
from typing import Any

import llguidance
import llguidance.llamacpp
import llguidance.numpy
import numpy as np

from rekindle.errors import InvalidRequest
from rekindle.model.hf_tokenizer import HfTokenizer
from rekindle.model.tokenizer import GgufTokenizer
from rekindle.serve.sampling import Vector

_COMPACT = {"whitespace_flexible": False}  # else a small model may write spaces until its tokens run out


class Grammars:
    """Makes a `Grammar` per request; the tokenizer's tables are built once, at the first use."""

    def __init__(self, tokenizer: GgufTokenizer | HfTokenizer) -> None:
        self._tokenizer = tokenizer
        self._tables: Any = None
        self._lock = threading.Lock()

    def for_schema(self, schema: Mapping[str, object]) -> Grammar:
        """Raises InvalidRequest if the schema can't be followed."""
        with self._lock:
            self._tables = self._tables or _tables(self._tokenizer)
        try:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_COMPACT)
        except ValueError as error:
            raise InvalidRequest(f"the JSON schema cannot be used: {error}", param="response_format") from None
        matcher = llguidance.LLMatcher(self._tables, grammar)
        if matcher.is_error():
            reason = matcher.get_error().splitlines()[0]
            raise InvalidRequest(f"the JSON schema cannot be used: {reason}", param="response_format")
        return Grammar(matcher, self._tokenizer.vocab_size)


def _tables(tokenizer: GgufTokenizer | HfTokenizer) -> Any:
    if isinstance(tokenizer, HfTokenizer):
        ends = tokenizer.ends or None
        return llguidance.LLTokenizer(tokenizer.definition, n_vocab=tokenizer.vocab_size, eos_token=ends)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # llguidance calls llama.cpp by some old names
        return llguidance.llamacpp.lltokenizer_from_vocab(tokenizer.vocab)


class Grammar:
    """Where one answer stands in its grammar."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher = matcher
        self._mask = llguidance.numpy.allocate_token_bitmask(1, vocab_size)

    def mask(self, logits: Vector) -> Vector:
        """A copy with -inf for tokens that may not come next."""
        llguidance.numpy.fill_next_token_bitmask(self._matcher, self._mask, 0)
        allowed = np.unpackbits(self._mask[0].view(np.uint8), bitorder="little")[: len(logits)]
        return np.where(allowed.astype(bool), logits, np.float32(-np.inf))

    def accept(self, token: int) -> None:
        self._matcher.consume_token(token)

    @property
    def finished(self) -> bool:
        """Nothing may follow."""
        return bool(self._matcher.is_stopped())
