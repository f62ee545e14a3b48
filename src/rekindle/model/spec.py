"""What the rest of the house needs to know of a model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Facts read from a model and from how it is set up to run."""

    name: str
    architecture: str  # "llama", "qwen3", …
    vocab_size: int
    num_layers: int
    train_context: int  # tokens it was trained to see
    kv_bytes_per_token: int  # in the KV type chosen
    window: int  # sliding window in tokens, 0 if every layer sees everything
    can_shift: bool  # K can be rotated to another position: `drop`, and `place` elsewhere, work
    can_look: bool = False  # one can stop between its layers and see what attention sees: `probe` and `attention` work
    kv_type: str = "f16"  # of the K and V cells, as the engine calls it
    fingerprint: bytes  # 16 bytes; equal fingerprints mean interchangeable KV
