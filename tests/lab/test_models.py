"""The maker of random-weight models: every shape loads in llama.cpp and decodes, and failures leave nothing behind."""

from __future__ import annotations

import errno
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest

from rekindle.errors import InvalidRequest, ModelError
from rekindle.lab import models, quants
from rekindle.lab.architectures import tensors
from rekindle.lab.bare import BareModel
from rekindle.lab.models import make_model
from rekindle.lab.quants import known_quantisations, quantisation_named
from rekindle.lab.shapes import SHAPES, shape_named
from rekindle.lab.vocabulary import read_vocabulary
from rekindle.model.source import BUILTIN, locate

TINY = sorted(name for name in SHAPES if name.startswith("tiny-"))
TEXT = "the house that jack built, and the people who lived in the house: " * 8


@pytest.mark.parametrize(
    ("shape", "quant"),
    [  # q4_k_m is llama.cpp's work; f16, bf16 and f32 are written here
        *((shape, quant) for shape in TINY for quant in ("f16", "q4_k_m")),
        *(("tiny-llama", quant) for quant in ("bf16", "f32", "q8_0")),
    ],
)
def test_tiny_models_load_and_decode_with_sane_logits(shape: str, quant: str, tmp_path: Path) -> None:
    # with the built-in tokenizer: of so few tokens as the test's tokenizer has, loops are likely
    report = make_model(shape, quant, tmp_path / "m.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
    assert report.bytes == report.path.stat().st_size
    with BareModel(report.path, threads=1, context=2_048) as model:
        assert model.file.num_parameters == report.parameters
        logits = model.append(model.tokenize(TEXT)).copy()
        assert np.isfinite(logits).all()
        assert 2.0 < logits.std() < 4.5
        answer = []
        for _ in range(40):
            answer.append(int(logits.argmax()))
            logits = model.append(answer[-1:])
        assert np.isfinite(logits).all()
        assert len(set(answer)) > 12, f"greedy decoding is stuck: {answer}"


@pytest.mark.parametrize("shape", TINY)
def test_tokens_far_back_change_the_logits(shape: str, tmp_path: Path, tokenizer: Path) -> None:
    """Otherwise a test with this model would not notice that the KV is wrong. Rounding changes them by 0.05 at most."""
    report = make_model(shape, "f16", tmp_path / "m.gguf", tokenizer=tokenizer)
    with BareModel(report.path, threads=1, context=2_048) as model:
        tokens = model.tokenize(TEXT)
        logits = model.append(tokens).copy()
        middle = len(tokens) // 2
        tokens[middle : middle + 16] = [(token * 7 + 3) % 256 for token in tokens[middle : middle + 16]]
        model.clear()
        assert np.abs(model.append(tokens) - logits).max() > 0.1


def test_gemma3_has_local_and_global_layers(tmp_path: Path, tokenizer: Path) -> None:
    shape = SHAPES["tiny-gemma3"]
    assert [shape.is_full_attention(i) for i in range(6)] == [False, False, True, False, False, True]
    report = make_model(shape, "f16", tmp_path / "m.gguf", tokenizer=tokenizer)
    fields = gguf.GGUFReader(report.path).fields
    assert fields["gemma3.attention.sliding_window"].contents() == 32
    assert fields["gemma3.attention.sliding_window_pattern"].contents() == [True, True, False, True, True, False]


@pytest.mark.parametrize(
    ("shape", "parameters", "kv_bytes_per_token"),
    [
        ("gemma3-270m", 268_098_176, 18_432),
        ("qwen3-0.6b", 596_049_920, 114_688),
        ("tinyllama-1.1b", 1_100_048_384, 22_528),
    ],
)
def test_real_shapes_have_the_published_number_of_parameters(
    shape: str, parameters: int, kv_bytes_per_token: int
) -> None:
    real = SHAPES[shape]
    assert real.vocabulary is not None
    assert sum(tensor.num_values for tensor in tensors(real, real.vocabulary)) == parameters
    assert real.layers * real.kv_heads * real.head_dim * 2 * 2 == kv_bytes_per_token


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path, tokenizer: Path) -> None:
    def made(name: str, seed: int, quant: str) -> bytes:
        return make_model("tiny-qwen3", quant, tmp_path / name, seed=seed, tokenizer=tokenizer).path.read_bytes()

    assert made("a.gguf", 1, "f16") == made("b.gguf", 1, "f16") != made("c.gguf", 2, "f16")
    assert made("d.gguf", 1, "q4_0") == made("e.gguf", 1, "q4_0")


def test_pieces_do_not_change_the_numbers(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make_model("tiny-llama", "bf16", tmp_path / "a.gguf", tokenizer=tokenizer).path.read_bytes()
    monkeypatch.setattr(models, "_PIECE_VALUES", 1_001)
    assert make_model("tiny-llama", "bf16", tmp_path / "b.gguf", tokenizer=tokenizer).path.read_bytes() == whole


def test_bf16_rounds_to_nearest_even() -> None:
    values = np.array([1.0, 1.00390625, 1.01171875, -3.1415927, 1e-30, 3e38], dtype=np.float32)
    ours = models._encode(values, "bf16").view(np.uint8)
    assert (ours == gguf.quants.quantize(values, gguf.GGMLQuantizationType.BF16)).all()


def test_the_tokenizer_is_padded_with_unused_tokens(tmp_path: Path, tokenizer: Path) -> None:
    own = len(read_vocabulary(tokenizer))
    shape = replace(SHAPES["tiny-llama"], vocabulary=own + 50)
    report = make_model(shape, "f16", tmp_path / "m.gguf", tokenizer=tokenizer)
    assert (report.vocabulary, report.padding_tokens) == (own + 50, 50)
    padded = read_vocabulary(report.path)
    assert padded.tokens[:own] == read_vocabulary(tokenizer).tokens
    assert padded.tokens[own] == "<|unused_0|>"
    assert padded.fields["tokenizer.ggml.token_type"].value[own:] == [int(gguf.TokenType.UNUSED)] * 50
    assert padded.fields["tokenizer.chat_template"] == read_vocabulary(tokenizer).fields["tokenizer.chat_template"]
    with (
        BareModel(report.path, threads=1, context=64) as model,
        BareModel(
            make_model("tiny-llama", "f16", tmp_path / "n.gguf", tokenizer=tokenizer).path, threads=1, context=64
        ) as plain,
    ):
        text = "<|user|> the café<|end|>"
        assert model.file.vocab_size == own + 50
        assert model.tokenize(text) == plain.tokenize(text)
        assert model.tokenize(text)[:3] == [0, 2, own - 1]


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gemma3"])  # an output matrix of its own, and a tied one
def test_padding_is_never_said(name: str, tmp_path: Path, tokenizer: Path) -> None:
    own = len(read_vocabulary(tokenizer))
    shape = replace(SHAPES[name], vocabulary=own + 2_000)
    path = make_model(shape, "f16", tmp_path / "m.gguf", tokenizer=tokenizer).path
    with BareModel(path, threads=1, context=256) as model:
        logits = model.append([3, 4, 5])
        said = [int(logits.argmax())]
        assert np.abs(logits[own:]).max() > 0  # computed like any other
        for _ in range(60):
            said.append(int(model.append(said[-1:]).argmax()))
    assert max(said) < own
    assert len(set(said)) > 10


def test_the_built_in_tokenizer_is_the_default(tmp_path: Path) -> None:
    ember = read_vocabulary(locate(BUILTIN))
    report = make_model("tiny-qwen3", "f16", tmp_path / "m.gguf")
    assert read_vocabulary(report.path) == ember


@pytest.mark.parametrize("shape", TINY)
def test_tiny_models_are_tiny(shape: str, tmp_path: Path) -> None:
    assert make_model(shape, "f16", tmp_path / "m.gguf").bytes < 3_000_000


def test_padding_never_repeats_a_name(tokenizer: Path) -> None:
    once = read_vocabulary(tokenizer).padded(300)
    twice = once.padded(400)
    assert len(set(twice.tokens)) == len(twice) == 400


def test_progress_counts_up_to_its_total(tmp_path: Path, tokenizer: Path) -> None:
    for quant, passes in (("f16", 1), ("q8_0", 2)):
        seen: list[tuple[int, int]] = []
        report = make_model(
            "tiny-llama",
            quant,
            tmp_path / f"{quant}.gguf",
            tokenizer=tokenizer,
            progress=lambda done, total: seen.append((done, total)),  # noqa: B023
        )
        assert seen == sorted(seen)
        assert {total for _, total in seen} == {passes * report.parameters}
        assert seen[-1][0] == passes * report.parameters


def test_unknown_names_come_with_the_nearest_known_one(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"'qwen3-0\.6b'"):
        make_model("qwen-0.6b", "f16", tmp_path / "m.gguf")
    with pytest.raises(InvalidRequest, match="'q4_k_m'"):
        make_model("tiny-llama", "q4_kk_m", tmp_path / "m.gguf")
    assert shape_named("Gemma3-270M").name == "gemma3-270m"
    assert quantisation_named("Q4-K-M").name == "q4_k_m"


def test_quantisations_that_need_an_importance_matrix_are_refused(tmp_path: Path) -> None:
    for quant in ("iq2_xxs", "IQ1_S", "q2_k_s", "iq3_xs"):
        with pytest.raises(InvalidRequest, match=r"importance matrix.*use (q2_k|iq3_s)"):
            make_model("tiny-llama", quant, tmp_path / "m.gguf")


@pytest.mark.parametrize("quant", sorted(known_quantisations()))
def test_every_known_quantisation_can_be_made(quant: str, tmp_path: Path, tokenizer: Path) -> None:
    shape = replace(SHAPES["tiny-llama"], width=256)  # blocks of 256, so that no tensor falls back to another type
    report = make_model(shape, quant, tmp_path / "m.gguf", tokenizer=tokenizer)
    with BareModel(report.path, threads=1, context=64) as model:
        assert np.isfinite(model.append(model.tokenize("the house"))).all()


def test_bad_targets_are_refused_and_left_alone(tmp_path: Path, tokenizer: Path) -> None:
    taken = tmp_path / "taken.gguf"
    taken.write_text("precious")
    with pytest.raises(InvalidRequest, match="exists already"):
        make_model("tiny-llama", "f16", taken, tokenizer=tokenizer)
    assert taken.read_text() == "precious"
    with pytest.raises(InvalidRequest, match="does not exist"):
        make_model("tiny-llama", "f16", tmp_path / "no" / "m.gguf", tokenizer=tokenizer)
    with pytest.raises(InvalidRequest, match=r"\.gguf"):
        make_model("tiny-llama", "f16", tmp_path / "m.bin", tokenizer=tokenizer)
    with pytest.raises(ModelError, match="too long"):
        make_model("tiny-llama", "f16", tmp_path / f"{'m' * 240}.gguf", tokenizer=tokenizer)
    assert list(tmp_path.iterdir()) == [taken]


def test_a_shape_too_large_for_the_disk_is_refused_before_it_is_made(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("usage", (), {"free": 100_000})
    monkeypatch.setattr(models.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ModelError, match="free"):
        make_model("tiny-llama", "f16", tmp_path / "m.gguf", tokenizer=tokenizer)
    assert list(tmp_path.iterdir()) == []


class FullDisk(io.FileIO):
    """A file whose disk is full after 200 KB."""

    def write(self, data: object) -> int:
        if self.tell() > 200_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data)  # type: ignore[arg-type]


def fail_with_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.open", lambda path, mode: FullDisk(path, mode))


def fail_with_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(line: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(quants, "_PROGRESS_LINE", SimpleNamespace(match=interrupt))  # while the quantiser runs


@pytest.mark.parametrize(
    ("sabotage", "error", "words"),
    [(fail_with_full_disk, ModelError, "disk .* is full"), (fail_with_interrupt, KeyboardInterrupt, None)],
)
def test_a_failure_leaves_nothing_behind(
    sabotage: Callable[[pytest.MonkeyPatch], None],
    error: type[BaseException],
    words: str | None,
    tmp_path: Path,
    tokenizer: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sabotage(monkeypatch)
    with pytest.raises(error, match=words):
        make_model("tiny-llama", "q8_0", tmp_path / "m.gguf", tokenizer=tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_llama_cpp_says_why_it_cannot_quantise(tmp_path: Path, tokenizer: Path) -> None:
    with pytest.raises(ModelError, match=r"q1_0.*no tensor type fallback"):
        make_model("tiny-gemma3", "q1_0", tmp_path / "m.gguf", tokenizer=tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_a_bad_tokenizer_file_is_named(tmp_path: Path, tokenizer: Path) -> None:
    torn = tmp_path / "torn.gguf"
    torn.write_bytes(tokenizer.read_bytes()[:300])
    empty = tmp_path / "empty.gguf"
    writer = gguf.GGUFWriter(None, "llama")
    writer.write_header_to_file(empty)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    text = tmp_path / "text.gguf"
    text.write_text("not a model at all, but long enough to be one")
    for path in (torn, empty, text, tmp_path / "missing.gguf", tmp_path):
        with pytest.raises(ModelError, match=path.name):
            make_model("tiny-llama", "f16", tmp_path / "m.gguf", tokenizer=path)


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    shape = replace(SHAPES["tiny-llama"], vocabulary=100)
    with pytest.raises(InvalidRequest, match="more than the 100"):
        make_model(shape, "f16", tmp_path / "m.gguf", tokenizer=tokenizer)
