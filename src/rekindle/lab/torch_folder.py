"""A folder of safetensors with random weights in the shape of a real model, to serve with the torch engine.

Its tokenizer and chat template are the built-in model's; the vocabulary beyond them is never said by a text.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from rekindle.errors import InvalidRequest, ModelError, nearest
from rekindle.lab.torch_models import real_model
from rekindle.model import ember

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class FolderReport:
    """What was written."""

    path: Path
    arch: str
    parameters: int
    bytes: int  # of the weights


def make_folder(shape: str, dtype: str, out: Path, *, seed: int = 0, context: int | None = None) -> FolderReport:
    """Write the folder, which must not exist. `context`: tokens it claims to read; default: the shape's.

    Raises InvalidRequest for an unknown shape or type, ModelError if it cannot be written.
    """
    if dtype not in DTYPES:
        raise InvalidRequest(f"a folder's type can't be {dtype!r}{nearest(dtype, DTYPES)}", param="quant")
    if out.exists():
        raise InvalidRequest(f"{out} exists already", param="out")
    model = real_model(shape, DTYPES[dtype], seed)
    if context is not None:
        model.config.max_position_embeddings = context
    try:
        model.save_pretrained(out)
        for name in _TOKENIZER:
            shutil.copy(ember.hf_path() / name, out / name)
    except OSError as error:
        shutil.rmtree(out, ignore_errors=True)
        raise ModelError(f"cannot write {out}: {error.strerror or error}") from None
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    parameters = sum(each.numel() for each in model.parameters())
    return FolderReport(out, str(model.config.model_type), parameters, size)
