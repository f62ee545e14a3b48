"""Opening model files: what is said of good ones, and how bad ones are refused without harm to the process."""

from __future__ import annotations

import os
import random
import struct
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import gguf
import pytest
from tests.model.conftest import Maker

from rekindle.errors import ModelError
from rekindle.lab.shapes import SHAPES
from rekindle.model.gguf import GgufModel
from rekindle.model.header import read_header
from rekindle.model.model import Model


def refusal(path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        GgufModel(path)
    return str(caught.value)


# Files that are no models.


def test_a_missing_file_is_named_with_what_could_be_given(tmp_path: Path) -> None:
    text = refusal(tmp_path / "none.gguf")
    assert "there is no model file at" in text and "none.gguf" in text and "builtin" in text and "hf:" in text


def test_a_folder_is_not_a_model(tmp_path: Path) -> None:
    assert "is a folder" in refusal(tmp_path)


def test_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    assert "not a regular file" in refusal(tmp_path / "pipe.gguf")


def test_an_empty_file_says_so(tmp_path: Path) -> None:
    (tmp_path / "empty.gguf").touch()
    assert "is empty; get it again" in refusal(tmp_path / "empty.gguf")


@pytest.mark.parametrize("start", [b"version https://git-lfs", b"<html>", b"PK\x03\x04", b"GG", b"\0" * 100])
def test_another_format_is_named_by_its_beginning(tmp_path: Path, start: bytes) -> None:
    path = tmp_path / "other.gguf"
    path.write_bytes(start)
    text = refusal(path)
    assert "is not a GGUF file" in text and repr(start[:4]) in text


def test_paths_that_no_file_system_holds_are_refused() -> None:
    assert "is not a path" in refusal(Path("a\0b.gguf"))
    assert "cannot read the model file" in refusal(Path("x" * 5000))
    with pytest.raises(ModelError, match="is not a path"):
        Model.open("~nobody-has-this-name/model.gguf")
    with pytest.raises(ModelError, match="is a folder"):
        Model.open("")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path: Path, tiny: Maker) -> None:
    path = tmp_path / "secret.gguf"
    path.write_bytes(tiny("tiny-llama").read_bytes())
    path.chmod(0)
    assert "Permission denied" in refusal(path)


def test_a_file_name_in_no_encoding_is_a_file_all_the_same(tmp_path: Path, tiny: Maker) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9.gguf")
    path.write_bytes(tiny("tiny-llama").read_bytes())
    with closing(GgufModel(path)) as model:
        assert model.num_layers == 3


def test_an_unknown_architecture_is_named(tmp_path: Path, tiny: Maker) -> None:
    path = tmp_path / "new.gguf"
    path.write_bytes(tiny("tiny-llama").read_bytes().replace(b"llama", b"lhama"))
    text = refusal(path)
    assert "architecture 'lhama'" in text and "take another model" in text


# Torn and damaged files. llama.cpp refuses most of them and dies of some; these tests run where dying does no harm.

_OPEN_ALL = """
import sys
from pathlib import Path
from rekindle.errors import ModelError
from rekindle.model.model import Model
for path in sorted(Path(sys.argv[1]).iterdir()):
    print(path.name, flush=True)
    try:
        model = Model.open(str(path))
        model.gguf.kv_bytes_per_token(), model.gguf.uncuttable, model.gguf.description
        model.tokenizer.encode("Anna paints in \\n 😀"), model.tokenizer.decode(range(model.tokenizer.vocab_size))
        model.close()
        print("opened")
    except ModelError as error:
        print("refused", " ".join(str(error).split()))
"""


def open_all(folder: Path) -> dict[str, str]:
    """Open every file of a folder in one other process: name -> "opened" or "refused" and why."""
    run = subprocess.run(
        [sys.executable, "-c", _OPEN_ALL, str(folder)],
        capture_output=True,
        text=True,
        env=os.environ | {"GGML_NO_BACKTRACE": "1"},
    )
    lines = run.stdout.splitlines()
    assert run.returncode == 0, f"{lines[-1]} ended the process ({run.returncode}): {run.stderr[-2000:]}"
    return dict(zip(lines[::2], lines[1::2], strict=True))


def test_a_file_cut_off_anywhere_is_refused(tmp_path: Path, tiny: Maker) -> None:
    data = tiny("tiny-llama").read_bytes()
    start_of_tensors = gguf.GGUFReader(tiny("tiny-llama")).data_offset
    lengths = [
        *range(4, 40),
        *range(40, start_of_tensors, start_of_tensors // 40),
        start_of_tensors,
        len(data) * 2 // 3,
    ]
    for length in lengths:
        (tmp_path / f"{length:08}.gguf").write_bytes(data[:length])
    for name, outcome in open_all(tmp_path).items():
        assert outcome.startswith("refused"), name
        assert "get it again" in outcome, name


def test_damaged_metadata_never_ends_the_process(tmp_path: Path, tiny: Maker) -> None:
    """Bytes of the header overwritten at random, from a fixed seed."""
    chance = random.Random(2)
    for shape in ("tiny-llama", "tiny-hybrid"):
        data = tiny(shape).read_bytes()
        fields = [
            (field.offset, sum(part.nbytes for part in field.parts))
            for field in gguf.GGUFReader(tiny(shape)).fields.values()
        ]
        for number in range(80):
            damaged = bytearray(data)
            for _ in range(chance.choice([1, 1, 3])):
                offset, size = chance.choice(fields)
                damaged[offset + chance.randrange(min(size, 200))] = chance.choice([0, 1, 128, 255])
            (tmp_path / f"{shape}-{number:03}.gguf").write_bytes(damaged)
    assert len(open_all(tmp_path)) == 160


def set_value(key: str, letter: str, value: float) -> Callable[[bytearray], None]:
    """An edit of a GGUF: this key's number becomes that one."""

    def edit(data: bytearray) -> None:
        at = data.index(key.encode()) + len(key) + 4
        struct.pack_into(f"<{letter}", data, at, value)

    return edit


def repeat_a_token(data: bytearray) -> None:
    one, other = b"\x07\0\0\0\0\0\0\0<|bos|>", b"\x07\0\0\0\0\0\0\0<|end|>"
    data[data.index(other) : data.index(other) + len(other)] = one


_DEADLY = {
    "no layers": set_value("llama.block_count", "I", 0),
    "too many layers": set_value("llama.block_count", "I", 513),
    "negative epsilon": set_value("llama.attention.layer_norm_rms_epsilon", "f", -1.0),
    "epsilon not a number": set_value("llama.attention.layer_norm_rms_epsilon", "f", float("nan")),
    "odd rotation": set_value("llama.rope.dimension_count", "I", 63),
    "wide rotation": set_value("llama.rope.dimension_count", "I", 1 << 20),
    "a token twice": repeat_a_token,
}


def test_what_llama_cpp_only_asserts_is_checked_before(tmp_path: Path, tiny: Maker) -> None:
    for name, edit in _DEADLY.items():
        data = bytearray(tiny("tiny-llama").read_bytes())
        edit(data)
        (tmp_path / f"{name}.gguf").write_bytes(data)
    outcomes = open_all(tmp_path)
    assert len(outcomes) == len(_DEADLY)
    for name, outcome in outcomes.items():
        assert outcome.startswith("refused") and "damaged" in outcome, (name, outcome)


def test_damaged_weights_do_no_harm(tmp_path: Path, tiny: Maker) -> None:
    """Weights are not checked: a model with damaged ones opens, and talks nonsense under a fingerprint of its own."""
    data = bytearray(tiny("tiny-llama").read_bytes())
    data[-4096:] = b"\xff" * 4096
    (tmp_path / "weights.gguf").write_bytes(data)
    assert open_all(tmp_path) == {"weights.gguf": "opened"}


# Facts.


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ("tiny-llama", None),
        ("tiny-qwen3", None),
        ("tiny-gemma3", None),
        ("tiny-mamba", "recurrent"),
        ("tiny-hybrid", "hybrid"),
    ],
)
@pytest.mark.parametrize("vocab_only", [False, True])
def test_models_that_cannot_be_cut_say_why(tiny: Maker, shape: str, reason: str | None, vocab_only: bool) -> None:
    with closing(GgufModel(tiny(shape), vocab_only=vocab_only)) as model:
        assert (model.uncuttable or "").startswith(reason or "")
        assert (model.uncuttable is None) == (reason is None)


@pytest.mark.parametrize(
    ("shape", "values"),  # K and V numbers of one token: layers with attention x KV heads x widths of K and V
    [("tiny-llama", 3 * 2 * 128), ("tiny-gemma3", 6 * 2 * 128), ("tiny-hybrid", 2 * 2 * 64), ("tiny-mamba", 0)],
)
@pytest.mark.parametrize("vocab_only", [False, True])
def test_kv_per_token_counts_the_layers_that_have_any(tiny: Maker, shape: str, values: int, vocab_only: bool) -> None:
    with closing(GgufModel(tiny(shape), vocab_only=vocab_only)) as model:
        assert model.kv_bytes_per_token() == 2 * values
        assert model.kv_bytes_per_token("q8_0") == values * 34 // 32
        assert model.kv_bytes_per_token("q4_0") == values * 18 // 32


@pytest.mark.parametrize(
    ("shape", "expected"), [("tinyllama-1.1b", 22_528), ("qwen3-0.6b", 114_688), ("gemma3-270m", 18_432)]
)
def test_kv_per_token_of_published_models(tmp_path: Path, tiny: Maker, shape: str, expected: int) -> None:
    """The metadata of the real shape on the vocabulary of a tiny model: a file without weights."""
    path = tmp_path / f"{shape}.gguf"
    write_without_weights(path, shape, tiny("tiny-llama"))
    with closing(GgufModel(path, vocab_only=True)) as model:
        assert model.kv_bytes_per_token() == expected


def write_without_weights(path: Path, name: str, tokenizer: Path) -> None:
    from rekindle.lab.architectures import write_metadata
    from rekindle.lab.vocabulary import read_vocabulary

    vocabulary = read_vocabulary(tokenizer)
    writer = gguf.GGUFWriter(path, SHAPES[name].arch)
    write_metadata(writer, SHAPES[name], len(vocabulary))
    vocabulary.write(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def test_head_width_follows_from_the_models_where_it_is_not_stated(tmp_path: Path, tiny: Maker) -> None:
    """Older files of the llama architecture have no key_length: width / heads holds."""
    data = tiny("tiny-llama").read_bytes()
    path = tmp_path / "old.gguf"
    path.write_bytes(data.replace(b"key_length", b"key_lengtj").replace(b"value_length", b"value_lengtj"))
    with closing(GgufModel(path, vocab_only=True)) as model:
        assert model.head_size == 128 // 4
        assert model.kv_bytes_per_token() == 3 * 2 * 2 * 32 * 2


def test_metadata_comes_as_text(tiny: Maker) -> None:
    with closing(GgufModel(tiny("tiny-gemma3"))) as model:
        assert model.metadata("gemma3.block_count") == "6"
        assert model.metadata("gemma3.no_such_thing") is None
        assert len(model.metadata("tokenizer.chat_template") or "") > 100
        assert (model.architecture, model.num_layers, model.window, model.train_context) == ("gemma3", 6, 32, 4096)
        assert model.name == "tiny-gemma3" and "gemma3" in model.description
        assert model.size_bytes < tiny("tiny-gemma3").stat().st_size
        assert model.num_parameters > 100_000


def test_long_metadata_is_read_whole(tmp_path: Path, tiny: Maker) -> None:
    long = "é" * 5000
    path = tmp_path / "long.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_description(long)
    writer.add_tokenizer_model("no_vocab")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert read_header(path)["general.description"] == long


def test_a_model_is_closed_once_and_refuses_afterwards(tiny: Maker) -> None:
    model = GgufModel(tiny("tiny-llama"))
    model.close()
    model.close()
    with pytest.raises(ModelError, match="closed"):
        _ = model.vocab_size


def test_a_model_with_a_broken_template_is_refused(tmp_path: Path, tiny: Maker) -> None:
    data = tiny("tiny-llama").read_bytes()
    path = tmp_path / "broken.gguf"
    path.write_bytes(data.replace(b"{%- endfor -%}", b"{%- endfro -%}"))
    with pytest.raises(ModelError, match="chat template is not valid"):
        Model.open(str(path))


def test_the_built_in_model_opens_by_name() -> None:
    with closing(Model.open("builtin", vocab_only=True)) as model:
        assert model.name == "ember"
        assert model.template is not None
        assert model.tokenizer.bos is not None
