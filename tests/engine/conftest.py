"""Engines under test: the toy; llama.cpp with ember and tiny random-weight models of real architectures, each in two KV
types; torch with ember and tiny models made from transformers' own configurations.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rekindle.engine.batch import Span
from rekindle.engine.llama import SCRATCH, LlamaEngine
from rekindle.engine.protocol import Engine, SequenceId, Work
from rekindle.engine.torch.engine import TorchEngine
from rekindle.engine.toy import ToyEngine
from rekindle.lab.models import make_model
from rekindle.lab.torch_models import TINY as TORCH_SHAPES
from rekindle.lab.torch_models import tiny_model
from rekindle.model import ember
from rekindle.model.gguf import GgufModel
from rekindle.model.spec import ModelSpec
from rekindle.tokens import Tokens

CELLS = 512
ROUNDING = {"f16": (0.1, 0.1), "q8_0": (0.25, 1.0)}  # of logits that spread over +-10; see `Bench`
TINY = ["tiny-llama", "tiny-qwen3", "tiny-gemma3"]
TORCH_ROUNDING = {"float32": (1e-3, 5e-3), "bfloat16": (0.5, 1.0)}
TORCH_KINDS = [
    "torch-ember-float32",
    "torch-qwen3-bfloat16",
    "torch-gemma3-bfloat16",
    *(f"torch-{shape}-float32" for shape in TORCH_SHAPES),
]
NEEDS_CUDA = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))
CUDA_KINDS = ["cuda-ember-float32", "cuda-gemma3-float32", "cuda-qwen3-bfloat16"]
KINDS = [
    "toy",
    "ember-f16",
    *(f"{shape}-{kv}" for shape in TINY for kv in ("f16", "q8_0")),
    *TORCH_KINDS,
    *(pytest.param(kind, marks=NEEDS_CUDA) for kind in CUDA_KINDS),
]
TOY_SPEC = ModelSpec(
    name="toy",
    architecture="toy",
    vocab_size=1000,
    num_layers=1,
    train_context=CELLS,
    kv_bytes_per_token=8,
    window=0,
    can_shift=True,
    fingerprint=b"toy" + bytes(13),
)


@dataclass
class Bench:
    """An engine with what the contract needs to know of it."""

    engine: Engine
    rounding: float  # largest logits difference that other batch shapes make
    rotation: float  # and that rotating K to another position makes, requantising it where it is quantised
    kind: str

    def random(self, seed: int, count: int) -> Tokens:
        return np.random.default_rng(seed).integers(10, self.engine.spec.vocab_size, count).astype(np.int32)

    def read(self, tokens: Tokens) -> SequenceId:
        """A new sequence with these tokens computed."""
        seq = self.engine.open()
        if len(tokens):
            self.engine.forward([Work(seq, tokens)])
        return seq

    def append_blind(self, seq: SequenceId, tokens: Tokens) -> None:
        """Compute tokens at the sequence's end with everything before them hidden: what `place` must equal."""
        engine, position = self.engine, self.engine.length(seq)
        if isinstance(engine, LlamaEngine):
            engine._compute([Span(SCRATCH, position, tokens, False)])
            engine._share(SCRATCH, seq, position, position + len(tokens))
            engine._remove(SCRATCH, 0)
            engine._table.append(seq, tokens)
        elif isinstance(engine, TorchEngine):
            engine.compute_blind(seq, tokens)
        else:
            assert isinstance(engine, ToyEngine)
            alone = self.read(tokens)
            states = engine._states[np.array(engine._table.cells(alone), dtype=np.intp)]
            engine.close(alone)
            engine._states[engine._table.append(seq, tokens)] = states

    def close(self, one: np.ndarray, other: np.ndarray, *, rotated: bool = False) -> bool:
        return float(np.abs(one - other).max()) <= (self.rotation if rotated else self.rounding)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {shape: make_model(shape, "f16", folder / f"{shape}.gguf").path for shape in TINY}


@pytest.fixture(scope="module", params=KINDS)
def bench(request: pytest.FixtureRequest, tiny_models: dict[str, Path]) -> Iterator[Bench]:
    kind: str = request.param
    if kind == "toy":
        yield Bench(ToyEngine(TOY_SPEC, CELLS - 1), 0.0, 0.0, kind)
        return
    if kind.startswith(("torch-", "cuda-")):
        torch_engine = open_torch(kind)
        yield Bench(torch_engine, *TORCH_ROUNDING[kind.rpartition("-")[2]], kind)
        torch_engine.check_integrity()
        torch_engine.shutdown()
        return
    shape, _, kv_type = kind.rpartition("-")
    model = GgufModel(ember.weights_path() if shape == "ember" else tiny_models[shape])
    engine = LlamaEngine(model, num_cells=CELLS, threads=1, kv_type=kv_type, max_sequences=16)
    yield Bench(engine, *ROUNDING[kv_type], kind)
    engine.check_integrity()
    engine.shutdown()
    model.close()


def open_torch(kind: str) -> TorchEngine:
    """An engine for a kind such as torch-ember-float32 or cuda-ember-float32."""
    where, _, rest = kind.partition("-")
    shape, _, dtype = rest.rpartition("-")
    if shape == "ember":
        model = AutoModelForCausalLM.from_pretrained(ember.hf_path(), dtype=getattr(torch, dtype))
    else:
        model = tiny_model(shape, getattr(torch, dtype))
    model = model.to("cuda" if where == "cuda" else "cpu")
    return TorchEngine(model, num_cells=CELLS, max_sequences=16)
