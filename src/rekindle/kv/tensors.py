"""Tensors as `SimpleKVCache` takes, keeps and gives them: torch or numpy, each comes back as it went in.

What is kept is a compact copy on the CPU, so a view does not keep its base alive, and nobody outside holds memory that is
cached. Torch is not imported unless a tensor of it, or a device other than the CPU, is given: it is an optional extra.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from rekindle.errors import InvalidRequest

if TYPE_CHECKING:
    import torch
    from typing_extensions import TypeIs

Tensor: TypeAlias = "torch.Tensor | npt.NDArray[Any]"
KV = tuple[Any, Any]  # K and V of one layer, each a Tensor; whoever gets one back knows of which kind
TokenIds: TypeAlias = "Sequence[int] | npt.NDArray[np.integer[Any]] | torch.Tensor"


def is_torch(value: object) -> TypeIs[torch.Tensor]:
    """Whether this is a torch tensor. Whoever made one has imported torch."""
    return isinstance(value, getattr(sys.modules.get("torch"), "Tensor", ()))


def check_device(device: object) -> str:
    """The device's name. Raises InvalidRequest if torch can't put tensors there now."""
    name = str(device)
    if name == "cpu":
        return name
    try:
        import torch
    except ImportError:
        raise InvalidRequest(
            f"the device {name!r} needs PyTorch, which is not installed: pip install 'rekindle[torch]'", param="device"
        ) from None
    if not isinstance(device, str | torch.device) or name == "meta":
        raise InvalidRequest(f"expected a device such as 'cpu' or 'cuda:0', got {device!r}", param="device")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise InvalidRequest(f"the device {name!r} can't be used: {reason}", param="device") from None
    return name


def num_bytes(tensor: object, what: str) -> int:
    """Bytes of a tensor's compact copy. Raises InvalidRequest if it is not a tensor whose values can be kept."""
    if is_torch(tensor):
        if str(tensor.layout) != "torch.strided" or tensor.is_meta:
            kind = "a meta tensor" if tensor.is_meta else f"layout {tensor.layout}"
            raise InvalidRequest(f"expected {what} to be a dense tensor with values, got {kind}", param=what)
        return tensor.numel() * tensor.element_size()
    if isinstance(tensor, np.ndarray):
        if tensor.dtype.hasobject:
            raise InvalidRequest(f"expected {what} to hold numbers, got an array of Python objects", param=what)
        return tensor.nbytes
    raise InvalidRequest(
        f"expected {what} to be a torch tensor or a numpy array, got {type(tensor).__name__}", param=what
    )


def keep(tensor: Tensor) -> Tensor:
    """A compact copy on the CPU, without history."""
    if is_torch(tensor):
        import torch

        return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    return np.array(tensor, order="C", copy=True)


def give(tensor: Tensor, device: str) -> Tensor:
    """A copy of a kept tensor, for a caller who may write into it: torch on `device`, numpy on the CPU."""
    return tensor.to(device, copy=True) if is_torch(tensor) else tensor.copy()


def as_token_ids(tokens: object) -> npt.NDArray[np.int64]:
    """Token ids as little-endian int64[length], from a sequence of ints or an array or tensor of shape [length] or
    [1, length]. Raises InvalidRequest."""
    expected = "expected token ids: integers of shape [length] or [1, length]"
    try:
        ids = np.asarray(tokens.detach().cpu().numpy() if is_torch(tokens) else tokens)
    except (ValueError, TypeError, OverflowError, RuntimeError) as error:
        raise InvalidRequest(f"{expected}; got {type(tokens).__name__}: {error}", param="prefix") from None
    if ids.ndim == 2 and len(ids) == 1:
        ids = ids[0]
    if ids.ndim == 1 and not len(ids):
        raise InvalidRequest("expected at least one token id, got none", param="prefix")
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or (ids.dtype == np.uint64 and ids.max() >= 1 << 63):
        raise InvalidRequest(f"{expected}; got {type(tokens).__name__} {ids.dtype}{list(ids.shape)}", param="prefix")
    return np.ascontiguousarray(ids, dtype="<i8")
