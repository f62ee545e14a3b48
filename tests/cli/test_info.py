"""`rekindle info`: the facts of models of several architectures, for people and for programs."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import BloomConfig

from rekindle.cli.info import ModelInfo, print_info, read_info
from rekindle.errors import ModelError
from rekindle.lab.models import make_model
from rekindle.lab.torch_models import TINY, random_model, tiny_model
from rekindle.model import ember

from .conftest import Run


def made(folder: Path, shape: str, quant: str = "f16") -> str:
    out = folder / f"{shape}.gguf"
    make_model(shape, quant, out)
    return str(out)


def printed(info: ModelInfo) -> str:
    console = Console(file=io.StringIO(), width=120)
    print_info(info, console)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_the_builtin_model_allows_every_kind_of_reuse() -> None:
    info = read_info("builtin")
    assert (info.name, info.architecture, info.context, info.chat_template) == ("ember", "llama", 4096, True)
    assert info.reuse.kinds == ("prefix", "whole prompt", "live session", "rolling window", "blending")
    assert info.fingerprint is not None and len(info.fingerprint) == 32
    f16 = info.kv_bytes_per_token["f16"]
    assert info.kv_bytes_per_token == {"f16": f16, "q8_0": f16 * 17 // 32, "q4_0": f16 * 9 // 32}


def test_quantisation_is_named_as_llama_cpp_does(tmp_path: Path) -> None:
    info = read_info(made(tmp_path, "tiny-qwen3", "q8_0"))
    assert (info.architecture, info.quantisation) == ("qwen3", "q8_0")
    assert info.rope.kind == "half pairs (NeoX)"


def test_a_sliding_window_is_told(tmp_path: Path) -> None:
    info = read_info(made(tmp_path, "tiny-gemma3"))
    assert info.sliding_window == 32
    assert "32 tokens" in printed(info)


@pytest.mark.parametrize(("shape", "reason"), [("tiny-mamba", "recurrent"), ("tiny-hybrid", "hybrid")])
def test_a_model_that_cannot_be_cut_is_described_with_the_reason(tmp_path: Path, shape: str, reason: str) -> None:
    info = read_info(made(tmp_path, shape))
    assert not info.reuse.can_cut
    assert info.reuse.obstacle is not None and info.reuse.obstacle.startswith(reason)
    assert info.reuse.kinds == ()
    assert info.fingerprint is None
    assert f"no: {reason}" in printed(info)


def test_a_copy_has_the_fingerprint_and_another_model_has_another(tmp_path: Path) -> None:
    original = read_info("builtin")
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(Path(original.path).read_bytes())
    assert read_info(str(copy)).fingerprint == original.fingerprint
    assert read_info(made(tmp_path, "tiny-llama")).fingerprint != original.fingerprint


def test_json_holds_what_the_table_shows(run_here: Run) -> None:
    result = run_here("info", "builtin", "--json")
    facts = json.loads(result.stdout)
    assert facts["reuse"]["kinds"] == list(read_info("builtin").reuse.kinds)
    assert facts["fingerprint"] in run_here("info", "builtin").stdout


def test_no_file_is_an_error() -> None:
    with pytest.raises(ModelError, match="no model file at"):
        read_info("/no/such/model.gguf")


def saved(folder: Path, shape: str) -> str:
    """A tiny model of an architecture of transformers, with the built-in model's tokenizer."""
    model = tiny_model(shape) if shape in TINY else random_model(BloomConfig(**BLOOM), torch.float32)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ember.hf_path() / name, folder)
    return str(folder)


BLOOM = {"vocab_size": 512, "hidden_size": 64, "n_layer": 2, "n_head": 4}


def test_a_folder_of_safetensors_is_described_as_a_file_is() -> None:
    folder, file = read_info(str(ember.hf_path())), read_info("builtin")
    same = ("architecture", "context", "vocabulary", "layers", "chat_template", "reuse", "sliding_window")
    assert [getattr(folder, name) for name in same] == [getattr(file, name) for name in same]
    assert (folder.rope.kind, folder.rope.base) == ("half pairs (NeoX)", 1e7)  # llama.cpp keeps its rows otherwise
    assert folder.kv_bytes_per_token == {"float32": 2048, "bfloat16": 1024, "float16": 1024}
    assert folder.fingerprint != file.fingerprint
    text = printed(folder)
    assert "float16" in text and "(float32 KV)" in text and text.splitlines()[1].startswith("folder")


def test_windows_and_scaled_rope_of_a_folder_are_told(tmp_path: Path) -> None:
    gemma = read_info(saved(tmp_path / "gemma3", "gemma3"))
    assert (gemma.sliding_window, gemma.rope.scaling, gemma.rope.factor) == (32, "linear", 8.0)
    assert "blending" in gemma.reuse.kinds
    phi = read_info(saved(tmp_path / "phi3", "phi3"))
    assert (phi.architecture, phi.rope.scaling) == ("phi3", "longrope")


def test_a_folder_that_the_engine_refuses_is_described_with_the_reason(tmp_path: Path) -> None:
    info = read_info(saved(tmp_path, "bloom"))
    assert not info.reuse.can_cut and info.fingerprint is None and info.kv_bytes_per_token == {}
    assert info.reuse.obstacle is not None and "attention interface" in info.reuse.obstacle
    assert "Rekindle refuses to serve this model" in printed(info)
