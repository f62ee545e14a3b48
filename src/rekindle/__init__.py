"""Rekindle: an LLM server and library that never computes the same KV twice.

import rekindle

llm = rekindle.load()
print(llm.generate("…"))
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from rekindle import openmp
from rekindle.errors import (
    EngineError,
    InvalidRequest,
    ModelError,
    Overloaded,
    PromptTooLong,
    RekindleError,
    SessionError,
    StoreError,
)

if TYPE_CHECKING:
    from rekindle.kv.simple import SimpleKVCache
    from rekindle.model.chunks import Chunk
    from rekindle.serve.local import LLM

openmp.load()  # before anything loads llama.cpp

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "Chunk",
    "EngineError",
    "InvalidRequest",
    "ModelError",
    "Overloaded",
    "PromptTooLong",
    "RekindleError",
    "SessionError",
    "SimpleKVCache",
    "StoreError",
    "load",
]


def load(model: str = "builtin", /, **settings: Any) -> LLM:
    """Open a model with its engine, store and worker. Settings are those of `rekindle.settings.Settings`.

    Raises ModelError if the model cannot be served, InvalidRequest for a bad setting.
    """
    from rekindle.serve.local import LLM  # here, so that `import rekindle` stays instant

    return LLM.open(model, **settings)


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from rekindle.serve.local import LLM

        return LLM
    if name == "SimpleKVCache":
        from rekindle.kv.simple import SimpleKVCache

        return SimpleKVCache
    if name == "Chunk":
        from rekindle.model.chunks import Chunk

        return Chunk
    if name == "torch":
        return import_module("rekindle.torch")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """What there is, for a prompt that completes names: what is loaded at its first use, too."""
    return sorted({*__all__, "__version__", "torch"})
