"""Weights of a folder in the Hugging Face layout, loaded into a stock transformers model.

transformers fills what a file lacks with noise and only warns; here a model that lacks something is refused. Its progress
bars and warnings are silenced while it loads: what is wrong is raised.

The type of the numbers: `auto` takes that of the weights, but float32 for float16 on a CPU, where float16 is slow and
overflows where models were not made for it. The device: `auto` takes a CUDA GPU, else Apple's (mps), else the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rekindle.errors import ModelError
from rekindle.model.hf import HfModel
from rekindle.model.hf_tokenizer import INSTALL

DTYPES = ("float32", "bfloat16", "float16")
_STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float32"}


def load_weights(model: HfModel, *, device: str = "auto", dtype: str = "auto", threads: int | None = None) -> Any:
    """A `transformers.PreTrainedModel` for generating text, in evaluation mode.

    `threads` is set for all of PyTorch in this process. Raises ModelError if PyTorch or transformers is not installed, the
    device is not there, the architecture is unknown, or weights are missing.
    """
    torch, transformers = _libraries(model)
    place = choose_device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    wanted = getattr(torch, choose_dtype(model, place, dtype))
    with _quiet(transformers):
        loaded = _load(transformers, model, wanted)
    try:
        return loaded.eval().to(place)
    except RuntimeError as error:  # out of memory, mostly
        raise ModelError(f"cannot put {model.path} on {place}: {_first_line(error)}") from None


def choose_device(device: str) -> str:
    """The device that a setting stands for: "cuda", "mps" or "cpu". Raises ModelError if it is not there."""
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return next(name for name, is_there in there.items() if is_there)
    if not there[device]:
        found = ", ".join(name for name, is_there in there.items() if is_there)
        raise ModelError(
            f"device {device} was asked for, but PyTorch {torch.__version__} finds none here; it finds: {found}"
        )
    return device


def choose_dtype(model: HfModel, device: str, dtype: str) -> str:
    """The type that a setting stands for, e.g. "bfloat16"."""
    if dtype != "auto":
        return dtype
    stated = model.config.get("dtype") or model.config.get("torch_dtype")  # of weights that are packed in another type
    stored = _STORED.get(model.dtype) or (stated if stated in DTYPES else "float32")
    return "float32" if stored == "float16" and device == "cpu" else stored


def _libraries(model: HfModel) -> tuple[Any, Any]:
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ModelError(
            f"{model.path} is a safetensors model, which runs on PyTorch and transformers, and {error.name} is not "
            f"installed: {INSTALL}"
        ) from None
    return torch, transformers


def _load(transformers: Any, model: HfModel, dtype: Any) -> Any:
    where: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
            model.path, dtype=dtype, use_safetensors=True, output_loading_info=True, **where
        )
    except Exception as error:  # its errors are of many kinds
        raise ModelError(_why_not(transformers, model, error)) from None
    if missing := sorted(report.get("missing_keys") or ()):
        raise ModelError(
            f"{model.path} lacks {len(missing)} of its weights ({', '.join(missing[:3])}); its config.json and its "
            "safetensors may be of different models"
        )
    return loaded


def _why_not(transformers: Any, model: HfModel, error: Exception) -> str:
    kind = model.config.get("model_type")
    if kind not in transformers.CONFIG_MAPPING:
        own = "; it brings code of its own, which Rekindle never runs" if model.config.get("auto_map") else ""
        known = f"which transformers {transformers.__version__} does not know"
        return f"{model.path} is a model of the type {kind!r}, {known}{own}"
    return f"transformers cannot load {model.path}: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    log = transformers.utils.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()
