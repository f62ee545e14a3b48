"""What the KV of a torch engine depends on, as a fingerprint.

The weights as they were loaded, whoever loaded them, so that a model which a program holds and the same one in a server
share their KV. The architecture's code (so the version of transformers) and what of the config it computes with, the
type, the layout of payloads, and how each layer's keys turn, as it was found and not as the config names it. The version
of torch counts too, without the suffix that names its build: its kernels round each in their own way, but CPU and GPU may
share.
"""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from rekindle.engine.torch.payload import LAYOUT
from rekindle.engine.torch.survey import Survey
from rekindle.model.fingerprint import FileStates, fingerprint

# Names of files, versions and habits of generation: they change nothing that is computed.
_IRRELEVANT = {
    "_name_or_path",
    "name_or_path",
    "transformers_version",
    "torch_dtype",
    "dtype",
    "use_cache",
    "architectures",
}


def weights_digest(model: nn.Module) -> bytes:
    """Digest of a model's parameters and buffers, 16 bytes. Reads them all: about a second per gigabyte."""
    digest = hashlib.blake2b(digest_size=16)
    seen: dict[tuple[int, torch.Size], str] = {}  # tied weights are read once
    for name, tensor in sorted(model.state_dict().items()):
        first = seen.setdefault((tensor.data_ptr(), tensor.shape), name)
        digest.update(f"{name} {first} {tensor.dtype} {list(tensor.shape)}\n".encode())
        if first != name:
            continue
        flat = tensor.detach().to("cpu").contiguous().view(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.digest()


def file_weights_digest(model: Any, files: FileStates) -> bytes:
    """The same of a model that was loaded from these files since their states were taken: read once for each state."""
    facts = {"dtype": str(model.dtype), "torch": version("torch"), "transformers": version("transformers")}
    return files.digest(facts, lambda: weights_digest(model))


def identify(model: Any, weights: bytes, found: Survey) -> bytes:
    """The fingerprint, 16 bytes."""
    config = {name: value for name, value in model.config.to_dict().items() if name not in _IRRELEVANT}
    return fingerprint(
        {
            "weights": weights.hex(),
            "engine": f"transformers {version('transformers')}, torch {version('torch').partition('+')[0]}",
            "class": type(model).__name__,
            "config": config,
            "layout": LAYOUT,
            "dtype": str(found.dtype),
            "rotations": [layer.rotation and layer.rotation.describe() for layer in found.layers],
        }
    )
