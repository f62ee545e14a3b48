"""Floor 5: reuse of KV as a library, on a transformers model that the caller holds. No server and no thread.

    import rekindle.torch

    with rekindle.torch.Cache("kv") as cache:                          # in memory, and in this folder
        answer = rekindle.torch.generate(model, tokenizer, "…", cache=cache)
    answer.text, answer.reused, answer.timings.ttft_ms

- `generate` answers a prompt and says what was reused and what each step took
- `Cache` keeps KV of prompts for any number of models, and gives and takes transformers' own `past_key_values`
- `attach` gives the engine itself, with its seven verbs (`rekindle.engine.protocol`)
- `to_dynamic_cache` and `from_dynamic_cache` carry KV between an engine's sequence and transformers

The model is lent to the engine for the length of a call and is left as it was; between calls it can be used as before.
"""

from __future__ import annotations

from rekindle.torch.attach import AttachedEngine, attach
from rekindle.torch.cache import Cache, Past
from rekindle.torch.generate import Generated, Timings, generate
from rekindle.torch.past import from_dynamic_cache, to_dynamic_cache

__all__ = [
    "AttachedEngine",
    "Cache",
    "Generated",
    "Past",
    "Timings",
    "attach",
    "from_dynamic_cache",
    "generate",
    "to_dynamic_cache",
]
