"""Ember, the built-in model: a small Llama that answers questions about facts in its context.

It exists so that everything in this house runs offline with real answers, and so that reuse of KV shows in *answers*:
a passage of its language may begin with "This one …", whose subject stands in the passage before, so the KV of a
passage depends on its neighbour.

- `language`: documents, facts and questions from a seed (no tensors)
- `dialogue`: roles, the chat template, small talk
- `lessons`: training examples and the attention they supervise
- `tokenizer`, `network`, `train`, `export`, `evaluate`: what their names say (these need the `train` extra)

This file imports neither torch nor anything else that is heavy: the server only wants to know where the weights are.
"""

from pathlib import Path

NAME = "ember"
_WEIGHTS = Path(__file__).parent / "weights"


def weights_path() -> Path:
    """The GGUF file."""
    return _WEIGHTS / "ember.gguf"


def hf_path() -> Path:
    """The folder in the Hugging Face layout: config, tokenizer and safetensors of the same weights."""
    return _WEIGHTS / "hf"
