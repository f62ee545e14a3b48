"""What is particular to llama.cpp: models it must refuse, caches it can't shift, payloads of other models."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import llama_cpp
import numpy as np
import pytest

from rekindle.engine.llama import MAX_SEQUENCES, SCRATCH, LlamaEngine
from rekindle.engine.protocol import Payload, Work
from rekindle.errors import EngineError, ForeignPayload, ModelError
from rekindle.lab.models import make_model
from rekindle.model import ember
from rekindle.model.gguf import GgufModel
from rekindle.tokens import as_tokens

TOKENS = as_tokens(range(20, 60))


@contextmanager
def opened(path: Path, kv_type: str = "f16") -> Iterator[LlamaEngine]:
    model = GgufModel(path)
    try:
        engine = LlamaEngine(model, num_cells=256, threads=1, kv_type=kv_type, max_sequences=MAX_SEQUENCES)
        yield engine
        engine.check_integrity()
        engine.shutdown()
    finally:
        model.close()


def read(engine: LlamaEngine) -> int:
    seq = engine.open()
    engine.forward([Work(seq, TOKENS)])
    return seq


@pytest.mark.parametrize(("shape", "word"), [("tiny-mamba", "recurrent"), ("tiny-hybrid", "hybrid")])
def test_a_model_whose_cache_cannot_be_cut_is_refused_with_the_reason(shape: str, word: str, tmp_path: Path) -> None:
    path = make_model(shape, "f16", tmp_path / "model.gguf").path
    with pytest.raises(ModelError, match=word), opened(path):
        pass


def test_a_file_that_was_swapped_after_it_was_loaded_gives_its_name_to_no_kv(tmp_path: Path) -> None:
    path = make_model("tiny-llama", "f16", tmp_path / "model.gguf").path
    model = GgufModel(path)
    shutil.copyfile(ember.weights_path(), tmp_path / "other.gguf")
    (tmp_path / "other.gguf").replace(path)
    with pytest.raises(ModelError, match="has changed since it was loaded"):
        LlamaEngine(model, num_cells=256, threads=1)
    model.close()


def test_quantised_keys_of_narrow_heads_are_not_shifted() -> None:
    """llama.cpp would read a null pointer; ember's heads are 32 wide."""
    with opened(ember.weights_path(), "q8_0") as engine:
        assert not engine.spec.can_shift
        seq = read(engine)
        with pytest.raises(EngineError, match="cannot be moved"):
            engine.drop(seq, 5, 10)
        payload = engine.export(seq, 0, 10)
        with pytest.raises(EngineError, match="cannot be moved"):
            engine.place(seq, payload, 40)
        engine.drop(seq, 30, 40)
        again = engine.open()
        engine.place(again, payload, 0)
        engine.forward([Work(again, TOKENS[10:])])
        assert engine.tokens(seq).tolist() == TOKENS[:30].tolist()


def test_payloads_of_another_kv_type_or_model_are_refused(tiny_models: dict[str, Path]) -> None:
    kinds = [(ember.weights_path(), "q8_0"), (tiny_models["tiny-llama"], "f16"), (tiny_models["tiny-gemma3"], "f16")]
    with opened(ember.weights_path()) as engine:
        for path, kv_type in kinds:
            with opened(path, kv_type) as other:
                assert other.spec.fingerprint != engine.spec.fingerprint
                payload = other.export(read(other), 0, 40)
            seq = engine.open()
            with pytest.raises(ForeignPayload, match="another model, KV type or build"):
                engine.place(seq, payload, 0)
            forged = Payload(payload.tokens, 0, payload.data, engine.spec.fingerprint)
            with pytest.raises(ForeignPayload):  # llama.cpp itself sees that rows differ in size
                engine.place(seq, forged, 0)
            engine.check_integrity()


def test_a_payload_serves_another_context_of_the_same_model() -> None:
    with opened(ember.weights_path()) as one, opened(ember.weights_path()) as other:
        first, second = read(one), other.open()
        other.place(second, one.export(first, 0, 40), 0)
        logits = one.forward([Work(first, TOKENS[:1])])[first]
        assert np.abs(logits - other.forward([Work(second, TOKENS[:1])])[second]).max() == 0


def test_many_sequences_in_one_batch() -> None:
    with opened(ember.weights_path()) as engine:
        seqs = [engine.open() for _ in range(MAX_SEQUENCES)]
        logits = engine.forward([Work(seq, TOKENS[:2]) for seq in seqs])
        assert all(np.abs(logits[seq] - logits[seqs[0]]).max() < 0.1 for seq in seqs)


def test_settings_that_llama_cpp_refuses_are_a_model_error() -> None:
    model = GgufModel(ember.weights_path())
    with pytest.raises(ModelError, match="cannot make a context"):
        LlamaEngine(model, num_cells=256, threads=1, max_sequences=1000)
    model.close()


@pytest.mark.parametrize("num_cells", [64, 300])
def test_a_small_cache_has_the_cells_that_were_asked_for(num_cells: int) -> None:
    model = GgufModel(ember.weights_path())
    engine = LlamaEngine(model, num_cells=num_cells, threads=1)
    seq = engine.open()
    engine.forward([Work(seq, as_tokens([20] * num_cells))])
    assert (engine.num_cells, engine.num_free_cells) == (num_cells, 0)
    engine.shutdown()
    model.close()


@pytest.mark.parametrize("shape", ["ember", "tiny-llama", "tiny-gemma3"])
def test_blocks_that_follow_each_other_are_loaded_together(
    shape: str, tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the first ones without a scratch sequence; a block of another size is loaded by itself."""
    loads: list[int] = []
    load = llama_cpp.llama_state_seq_set_data

    def counted(context: object, data: object, size: int, seq: int) -> int:
        loads.append(seq)
        return int(load(context, data, size, seq))

    monkeypatch.setattr(llama_cpp, "llama_state_seq_set_data", counted)
    with opened(tiny_models.get(shape, ember.weights_path())) as engine:
        seq = read(engine)
        blocks = [engine.export(seq, start, min(start + 12, 40)) for start in range(0, 40, 12)]
        again = engine.open()
        engine.place_all(again, blocks)
        assert loads == [again, SCRATCH]
        for block in blocks:
            same = engine.export(again, block.position, block.position + len(block))
            assert bytes(same.data) == bytes(block.data)
        logits = engine.forward([Work(seq, TOKENS[:1])])[seq].copy()
        assert np.abs(logits - engine.forward([Work(again, TOKENS[:1])])[again]).max() < 1e-3
