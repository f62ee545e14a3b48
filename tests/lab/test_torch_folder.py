"""Folders of random weights are served by the torch engine, and bad wishes leave nothing behind."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rekindle.cli.app import app
from rekindle.errors import InvalidRequest
from rekindle.lab.shapes import shape_named
from rekindle.model.gguf import GgufModel
from rekindle.serve.service import Service
from rekindle.settings import Settings

needs_torch = pytest.mark.skipif(
    not (find_spec("torch") and find_spec("transformers")), reason="needs torch and transformers"
)


@needs_torch
@pytest.mark.slow
def test_a_folder_is_served(tmp_path: Path) -> None:
    from rekindle.lab.torch_folder import make_folder

    report = make_folder("gemma3-270m", "bf16", tmp_path / "model", context=3000)
    assert report.parameters > 260e6 and report.bytes == pytest.approx(2 * report.parameters, rel=0.01)
    settings = Settings(model=str(report.path), store="none", threads=1, context=512)
    with Service.open(settings) as service:
        assert service.model.train_context == 3000 and service.health()["engine"] == "torch"
        assert service.warm(service.chat_prompt([{"role": "user", "content": "Hello."}])).tokens > 3


@needs_torch
@pytest.mark.parametrize("shape", ["tiny-llama", "tiny-qwen3", "tiny-gemma3"])
def test_a_tiny_folder_has_the_vocabulary_of_its_tokenizer(shape: str, tmp_path: Path) -> None:
    from rekindle.lab.torch_folder import make_folder

    report = make_folder(shape, "f32", tmp_path / "model")
    settings = Settings(model=str(report.path), store="none", threads=1, context=256)
    with Service.open(settings) as service:
        assert service.engine_spec.vocab_size == service.model.tokenizer.vocab_size
        assert service.warm(service.chat_prompt([{"role": "user", "content": "Hello."}])).tokens > 3


@needs_torch
def test_bad_wishes_are_refused(tmp_path: Path) -> None:
    from rekindle.lab.torch_folder import make_folder

    for shape, dtype, message in (("gemma3", "bf16", "did you mean"), ("gemma3-270m", "q8_0", "can't be 'q8_0'")):
        with pytest.raises(InvalidRequest, match=message):
            make_folder(shape, dtype, tmp_path / "new")
    with pytest.raises(InvalidRequest, match="exists already"):
        make_folder("gemma3-270m", "bf16", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_a_gguf_or_a_folder(tmp_path: Path) -> None:
    shape = replace(shape_named("tiny-llama"), context=9000)
    done = CliRunner().invoke(app, ["lab", "model", shape.name, str(tmp_path / "m.gguf"), "--context", "9000"])
    assert done.exit_code == 0, done.output
    model = GgufModel(tmp_path / "m.gguf")
    assert model.train_context == shape.context
    model.close()
    refused = CliRunner().invoke(app, ["lab", "model", shape.name, str(tmp_path / "m"), "--folder", "--quant", "q8_0"])
    assert refused.exit_code == 2 and not (tmp_path / "m").exists()
