"""Folders of safetensors: what is read of them, what is refused, and with which words."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from rekindle.errors import ModelError
from rekindle.model import ember
from rekindle.model.fingerprint import files_digest
from rekindle.model.hf import HfModel, files_of_model
from rekindle.model.hf_load import choose_dtype, load_weights
from rekindle.model.model import Model, file_state

Folder = Path


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """A copy of the built-in model to be damaged."""
    return Path(shutil.copytree(ember.hf_path(), tmp_path / "model"))


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(file.read_text("utf-8")) if file.exists() else {}
    change(content)
    file.write_text(json.dumps(content), "utf-8")


def split(folder: Folder) -> list[str]:
    """The weights in two files with an index, as large models come."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    files = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, some in files.items():
        save_file({name: tensors[name] for name in some}, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, some in files.items() for name in some}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "model.safetensors").unlink()
    return list(files)


def refusal(folder: Folder) -> str:
    with pytest.raises(ModelError) as refused:
        load_weights(Model.open(str(folder)).hf, device="cpu")  # type: ignore[arg-type]
    return str(refused.value)


def test_the_facts_are_those_of_the_files() -> None:
    model = HfModel(ember.hf_path())
    assert (model.architecture, model.dtype, model.train_context, model.vocab_size) == ("llama", "F16", 4096, 2302)
    assert model.num_parameters == sum(each.size for each in load_file(ember.hf_path() / "model.safetensors").values())
    assert (model.begin_token, model.end_tokens) == (0, {1})


def test_a_model_in_several_files_is_one(folder: Folder) -> None:
    whole = HfModel(folder)
    split(folder)
    parts = HfModel(folder)
    assert parts.num_parameters == whole.num_parameters
    one, other = (load_weights(model, device="cpu").state_dict() for model in (HfModel(ember.hf_path()), parts))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_every_end_token_of_the_generation_config_counts(folder: Folder) -> None:
    edit(folder / "generation_config.json", lambda config: config.update(eos_token_id=[1, 4]))
    tokenizer = Model.open(str(folder)).tokenizer
    assert [token for token in range(10) if tokenizer.is_end(token)] == [1, 4]
    (folder / "generation_config.json").unlink()
    assert HfModel(folder).end_tokens == {1}  # config.json's


def test_the_text_part_of_a_model_that_also_sees_is_read(folder: Folder) -> None:
    def nest(config: dict[str, Any]) -> None:
        inner = dict(config)
        config.clear()
        config.update(model_type="gemma3", text_config=inner | {"max_position_embeddings": 123})

    edit(folder / "config.json", nest)
    assert (HfModel(folder).train_context, HfModel(folder).architecture) == (123, "llama")


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("file", "from a file"),
        ("text", "from the config"),
        ("list", "for every day"),
        ("none", None),
    ],
)
def test_chat_templates_are_found_where_they_may_be(folder: Folder, form: str, expected: str | None) -> None:
    stated: Any = {
        "text": "from the config",
        "list": [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "for every day"}],
    }.get(form)
    edit(folder / "tokenizer_config.json", lambda config: config.update(chat_template=stated or "from the config"))
    if form == "file":
        (folder / "chat_template.jinja").write_text("from a file")
    if form == "none":
        edit(folder / "tokenizer_config.json", lambda config: config.pop("chat_template"))
    assert HfModel(folder).chat_template == expected
    template = Model.open(str(folder)).template
    assert (template is None) == (expected is None)


def test_a_template_is_rendered_with_the_special_tokens(folder: Folder) -> None:
    (folder / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}")
    template = Model.open(str(folder)).template
    assert template is not None and template.render([{"role": "user", "content": "x"}]) == "<|bos|>x<|end|>"


# What is missing or damaged.


def test_a_file_of_weights_is_no_model_but_its_folder_is(folder: Folder) -> None:
    with pytest.raises(ModelError, match="holds weights alone; give the folder with it"):
        Model.open(str(folder / "model.safetensors"))


def test_a_folder_that_is_no_model_says_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"folder without config\.json; expected the path of a \.gguf file, or of a folder"
    ):
        Model.open(str(tmp_path))
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ModelError, match=r"it holds model\.gguf, whose path would be a model"):
        Model.open(str(tmp_path))


def test_without_weights_it_says_which_files_are_expected(folder: Folder) -> None:
    (folder / "model.safetensors").unlink()
    assert "holds no weights; expected model.safetensors" in refusal(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02")
    assert "only as pickles, which Rekindle does not load, because that runs code" in refusal(folder)


def test_a_missing_part_is_named(folder: Folder) -> None:
    _, second = split(folder)
    (folder / second).unlink()
    assert f"lacks 1 of 2 weight files ({second})" in refusal(folder)


def test_an_index_may_name_no_file_outside_the_folder(folder: Folder) -> None:
    split(folder)
    edit(
        folder / "model.safetensors.index.json", lambda index: index["weight_map"].update(x="../../secret.safetensors")
    )
    assert "names '../../secret.safetensors', expected" in refusal(folder)


@pytest.mark.parametrize("damage", ["empty", "cut", "header", "pointer", "noise"])
def test_damaged_weights_are_refused_before_they_are_loaded(folder: Folder, damage: str) -> None:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(
        {
            "empty": b"",
            "cut": data[:-100],
            "header": data[:8] + b"}" + data[9:],
            "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n",
            "noise": np.random.default_rng(0).bytes(1000),
        }[damage]
    )
    expected = "is a Git LFS pointer" if damage == "pointer" else "is cut off or damaged"
    assert expected in refusal(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "[" * 100_000])
def test_a_config_that_is_none_is_refused(folder: Folder, content: str) -> None:
    (folder / "config.json").write_text(content)
    text = refusal(folder)
    assert "config.json is not" in text and "get it again" in text


def test_without_a_tokenizer_it_says_so(folder: Folder) -> None:
    (folder / "tokenizer.json").unlink()
    assert "has no tokenizer" in refusal(folder)


def test_a_damaged_tokenizer_is_refused(folder: Folder) -> None:
    (folder / "tokenizer.json").write_text('{"model": {}}')
    assert "tokenizer.json is not a tokenizer" in refusal(folder)


def test_weights_that_are_missing_are_not_made_up(folder: Folder) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "lacks 1 of its weights (model.layers.1.mlp.up_proj.weight)" in refusal(folder)


def test_weights_of_another_shape_are_refused(folder: Folder) -> None:
    edit(folder / "config.json", lambda config: config.update(intermediate_size=200))
    assert "transformers cannot load" in refusal(folder)


def test_an_unknown_architecture_is_named_and_its_code_not_run(folder: Folder) -> None:
    trap = folder / "modeling_trap.py"
    trap.write_text(f"open({str(folder / 'sprung')!r}, 'w')\nclass Config: pass\nclass Trap: pass\n")
    auto = {"AutoConfig": "modeling_trap.Config", "AutoModelForCausalLM": "modeling_trap.Trap"}
    edit(folder / "config.json", lambda config: config.update(model_type="trap", auto_map=auto))
    text = refusal(folder)
    assert (
        "model of the type 'trap', which transformers" in text and "code of its own, which Rekindle never runs" in text
    )
    assert not (folder / "sprung").exists()


def test_code_beside_a_known_architecture_is_not_run(folder: Folder) -> None:
    trap = folder / "modeling_trap.py"
    trap.write_text(f"open({str(folder / 'sprung')!r}, 'w')\n")
    auto = {"AutoConfig": "modeling_trap.Config", "AutoModelForCausalLM": "modeling_trap.Trap"}
    edit(folder / "config.json", lambda config: config.update(auto_map=auto))
    assert type(load_weights(HfModel(folder), device="cpu")).__name__ == "LlamaForCausalLM"
    assert not (folder / "sprung").exists()


# Loading.


def test_float16_becomes_float32_on_a_cpu_alone() -> None:
    model = HfModel(ember.hf_path())
    assert [choose_dtype(model, device, "auto") for device in ("cpu", "cuda", "mps")] == [
        "float32",
        "float16",
        "float16",
    ]
    assert choose_dtype(model, "cpu", "bfloat16") == "bfloat16"


def test_packed_weights_have_the_type_that_the_config_names(folder: Folder) -> None:
    edit(folder / "config.json", lambda config: config.update(torch_dtype="bfloat16", dtype=None))
    save_file({"packed": np.zeros((4, 4), np.int32)}, folder / "model.safetensors")
    assert choose_dtype(HfModel(folder), "cpu", "auto") == "bfloat16"


def test_loading_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging

    before = (logging.get_verbosity(), logging.is_progress_bar_enabled())
    load_weights(HfModel(ember.hf_path()), device="cpu")
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_the_digest_is_that_of_all_weight_files(folder: Folder, tmp_path: Path) -> None:
    split(folder)
    files = HfModel(folder).weight_files
    one = files_digest(files, tmp_path / "notes")
    with files[1].open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    assert files_digest(files, tmp_path / "notes") != one


def test_a_changed_file_changes_the_state_of_a_folder(folder: Folder) -> None:
    before = file_state(folder)
    edit(folder / "tokenizer_config.json", lambda config: config.update(new="entry"))
    assert file_state(folder) != before


def test_of_a_repository_only_the_model_is_taken() -> None:
    names = [
        "README.md",
        "config.json",
        "consolidated.safetensors",
        "model-00001-of-00001.safetensors",
        "tokenizer.json",
    ]
    assert files_of_model([*names, "onnx/model.onnx", "pytorch_model.bin", "modeling_x.py"]) == [
        "config.json",
        "tokenizer.json",
        "model-00001-of-00001.safetensors",
    ]
    assert files_of_model(["model.safetensors", "README.md"]) == []
    assert files_of_model(["config.json", "pytorch_model.bin"]) == []
