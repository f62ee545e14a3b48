"""An engine on a model that somebody else has loaded, and goes on using."""

from __future__ import annotations

from typing import Any

from rekindle.engine.torch.engine import TorchEngine
from rekindle.model.hf_tokenizer import HfTokenizer
from rekindle.model.template import ChatTemplate

DEFAULT_CELLS = 8192
MAX_SEQUENCES = 16


class AttachedEngine(TorchEngine):
    """A torch engine with the model and the tokenizer that it was made for."""

    def __init__(
        self, model: Any, tokenizer: Any, *, num_cells: int, max_sequences: int, weights: bytes | None = None
    ) -> None:
        """See `attach`."""
        super().__init__(model, num_cells=num_cells, max_sequences=max_sequences, weights=weights)
        self.model = model
        ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        self.tokenizer = HfTokenizer.of(
            tokenizer,
            vocab_size=self.spec.vocab_size,
            ends=() if ends is None else ends if isinstance(ends, list) else [ends],
        )
        self.template = self._template(tokenizer)

    def _template(self, tokenizer: Any) -> ChatTemplate | None:
        source = getattr(tokenizer, "chat_template", None)
        if isinstance(source, dict):
            source = source.get("default")
        own = self.tokenizer
        return ChatTemplate(source, bos=own.special_text(own.bos), eos=own.special_text(own.eos)) if source else None


def attach(
    model: Any,
    tokenizer: Any,
    *,
    context: int | None = None,
    max_sequences: int = MAX_SEQUENCES,
    weights: bytes | None = None,
) -> AttachedEngine:
    """An engine on a `transformers` model for text, on its device and in its type, and its fast tokenizer.

    `context` is the number of cells: tokens of all sequences together; by default twice what the model was trained for,
    and 8,192 at most. `weights` is a digest of the weights for the fingerprint; without it they are read once, about a
    second per gigabyte. After the model's weights were changed, attach again: KV of the old ones means nothing to it.

    RoPE that changes with the length of the text (longrope) is held at one set of frequencies, for `context` tokens.

    Raises ModelError if the model can't be served, is in training mode, or has no fast tokenizer.
    """
    trained = getattr(model.config.get_text_config(), "max_position_embeddings", None) or DEFAULT_CELLS
    return AttachedEngine(
        model,
        tokenizer,
        num_cells=context or min(DEFAULT_CELLS, 2 * int(trained)),
        max_sequences=max_sequences,
        weights=weights,
    )
