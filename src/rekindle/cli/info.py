"""`rekindle info MODEL`: what a model is, what its KV costs, and which kinds of reuse it allows.

The model is loaded as the server would load it, with a small context, so what is said is what serving would meet.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import llama_cpp
from rich.console import Console
from rich.table import Table

from rekindle.engine.llama import KV_TYPES, LlamaEngine
from rekindle.model.gguf import GgufModel
from rekindle.model.model import Model

PROBE_CELLS = 256  # enough to ask the context what it can do
_ROPE_KINDS = {
    llama_cpp.LLAMA_ROPE_TYPE_NONE: "none",
    llama_cpp.LLAMA_ROPE_TYPE_NORM: "adjacent pairs",
    llama_cpp.LLAMA_ROPE_TYPE_NEOX: "half pairs (NeoX)",
    llama_cpp.LLAMA_ROPE_TYPE_MROPE: "multimodal (M-RoPE)",
    llama_cpp.LLAMA_ROPE_TYPE_IMROPE: "multimodal, interleaved (IM-RoPE)",
    llama_cpp.LLAMA_ROPE_TYPE_VISION: "vision",
}
_FILE_TYPES = {
    int(getattr(llama_cpp, name)): name.removeprefix("LLAMA_FTYPE_")
    .removeprefix("ALL_")
    .removeprefix("MOSTLY_")
    .lower()
    for name in dir(llama_cpp)
    if name.startswith("LLAMA_FTYPE_")
}


@dataclass(frozen=True, kw_only=True)
class Rope:
    """How positions enter K."""

    kind: str
    base: float | None  # None: the file does not say, the architecture's default holds
    scaling: str  # "none", "linear", "yarn", …
    factor: float | None


@dataclass(frozen=True, kw_only=True)
class Reuse:
    """What may be done with the model's KV."""

    can_cut: bool  # at any token: prefix, whole prompt and live session reuse
    can_shift: bool  # to another position: rolling window and blending
    obstacle: str | None  # why not, if not

    @property
    def kinds(self) -> tuple[str, ...]:
        exact = ("prefix", "whole prompt", "live session") if self.can_cut else ()
        return exact + (("rolling window", "blending") if self.can_shift else ())


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """The facts about one model."""

    model: str  # as it was asked for
    name: str
    path: str
    architecture: str
    parameters: int
    weight_bytes: int
    quantisation: str
    context: int  # tokens it was trained to see
    vocabulary: int
    layers: int
    kv_bytes_per_token: dict[str, int]  # by KV type
    rope: Rope
    sliding_window: int  # tokens; 0: every layer sees everything
    reuse: Reuse
    chat_template: bool
    fingerprint: str | None  # with KV of `kv_type`; None if the model can't be served
    kv_type: str = "f16"

    def as_dict(self) -> dict[str, Any]:
        facts = asdict(self)
        facts["reuse"]["kinds"] = list(self.reuse.kinds)
        return facts


def read_info(name: str) -> ModelInfo:
    """Load a model and look. Raises ModelError."""
    model = Model.open(name)
    with closing(model):
        if model.hf is not None:
            from rekindle.cli.info_folder import describe_folder  # here, because it brings torch

            return describe_folder(name, model, model.hf)
        gguf = model.gguf
        assert gguf is not None
        reuse, fingerprint = _probe(gguf)
        return ModelInfo(
            model=name,
            name=model.name,
            path=str(model.path),
            architecture=gguf.architecture,
            parameters=gguf.num_parameters,
            weight_bytes=gguf.size_bytes,
            quantisation=_quantisation(gguf),
            context=gguf.train_context,
            vocabulary=gguf.vocab_size,
            layers=gguf.num_layers,
            kv_bytes_per_token={kind: gguf.kv_bytes_per_token(kind) for kind in KV_TYPES},
            rope=_rope(gguf),
            sliding_window=gguf.window,
            reuse=reuse,
            chat_template=model.template is not None,
            fingerprint=fingerprint,
        )


def _probe(gguf: GgufModel) -> tuple[Reuse, str | None]:
    if gguf.uncuttable is not None:
        return Reuse(can_cut=False, can_shift=False, obstacle=gguf.uncuttable), None
    engine = LlamaEngine(gguf, num_cells=PROBE_CELLS, threads=1)
    try:
        spec = engine.spec
    finally:
        engine.shutdown()
    obstacle = None if spec.can_shift else "llama.cpp cannot move this model's K to other positions"
    return Reuse(can_cut=True, can_shift=spec.can_shift, obstacle=obstacle), spec.fingerprint.hex()


def _quantisation(gguf: GgufModel) -> str:
    number = gguf.metadata("general.file_type")
    return "unknown" if number is None else _FILE_TYPES.get(int(number), f"file type {number}")


def _rope(gguf: GgufModel) -> Rope:
    def number(key: str) -> float | None:
        value = gguf.metadata(f"{gguf.architecture}.rope.{key}")
        return None if value is None else float(value)

    return Rope(
        kind=_ROPE_KINDS.get(llama_cpp.llama_model_rope_type(gguf.handle), "unknown"),
        base=number("freq_base"),
        scaling=gguf.metadata(f"{gguf.architecture}.rope.scaling.type") or "none",
        factor=number("scaling.factor"),
    )


def print_info(info: ModelInfo, console: Console) -> None:
    """The facts as two columns."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in _rows(info):
        table.add_row(name, value)
    console.print(table, highlight=False, markup=False)


def _rows(info: ModelInfo) -> list[tuple[str, str]]:
    kv = ", ".join(f"{size:,} bytes in {kind}" for kind, size in info.kv_bytes_per_token.items())
    window = f"{info.sliding_window:,} tokens" if info.sliding_window else "none"
    return [
        ("model", info.name),
        ("folder" if Path(info.path).is_dir() else "file", info.path),
        ("architecture", f"{info.architecture}, {info.layers} layers, vocabulary of {info.vocabulary:,}"),
        ("parameters", f"{info.parameters:,}"),
        ("weights", f"{info.weight_bytes / 1e6:,.1f} MB, {info.quantisation}"),
        ("context", f"{info.context:,} tokens"),
        ("KV per token", kv or "unknown"),
        ("RoPE", _rope_text(info.rope)),
        ("sliding window", window),
        ("can be cut", "yes, at any token" if info.reuse.can_cut else f"no: {info.reuse.obstacle}"),
        ("can be shifted", "yes" if info.reuse.can_shift else f"no: {info.reuse.obstacle}"),
        ("reuse", ", ".join(info.reuse.kinds) or "none: Rekindle refuses to serve this model"),
        ("chat template", "yes" if info.chat_template else "no: completions only"),
        ("fingerprint", f"{info.fingerprint} ({info.kv_type} KV)" if info.fingerprint else "none"),
    ]


def _rope_text(rope: Rope) -> str:
    if rope.kind == "none":
        return "none"
    base = "" if rope.base is None else f", base {rope.base:,.0f}"
    scaling = "no scaling" if rope.scaling == "none" else f"{rope.scaling} scaling"
    factor = "" if rope.factor is None else f" by {rope.factor:g}"
    return f"{rope.kind}{base}, {scaling}{factor}"
