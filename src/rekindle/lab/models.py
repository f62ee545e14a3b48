"""Models with random weights: the real architecture and size of a published model, without its download.

Speed, memory and the size of the KV depend on a model's shape and quantisation, not on what it learned; so a benchmark
or a test needs only the shape. `make_model` writes a GGUF file that llama.cpp loads like any other: hyperparameters
as published, ember's tokenizer padded to the published vocabulary, and noise scaled as `architectures.py` explains.

The file is written tensor by tensor, in pieces of a few megabytes, so memory stays small whatever the model. Floats are
written directly; everything else goes through an f16 file beside the target and llama.cpp's own quantiser. The target's
name appears only when the file is whole.

Each tensor has its own generator, seeded by the seed and the tensor's name. So the same seed, shape, quantisation,
tokenizer and numpy give the same bytes, and a tensor does not change when another is added.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import gguf
import numpy as np
import numpy.typing as npt

from rekindle.errors import InvalidRequest, ModelError
from rekindle.lab.architectures import PADDING_LOUDNESS, Tensor, tensors, write_metadata
from rekindle.lab.quants import Quantisation, known_quantisations, quantisation_named, quantise
from rekindle.lab.shapes import Shape, shape_named
from rekindle.lab.vocabulary import Vocabulary, read_vocabulary
from rekindle.model.source import BUILTIN, locate

Progress = Callable[[int, int], None]  # parameters done, of how many; a quantised file counts each of them twice

_PIECE_VALUES = 1 << 22  # numbers drawn at once: 16 MB of float32


@dataclass(frozen=True)
class ModelReport:
    """What `make_model` wrote."""

    path: Path
    shape: str  # the shape's name
    arch: str  # llama.cpp's name of the architecture
    quant: str  # the quantisation's name
    parameters: int  # numbers in all tensors; tied embeddings count once
    vocabulary: int  # tokens, padding included
    padding_tokens: int  # tokens that only fill the vocabulary up
    bytes: int  # of the file
    seconds: float  # from the call to the file's appearance
    seed: int


def make_model(
    shape: str | Shape,
    quant: str,
    out: Path,
    *,
    seed: int = 0,
    progress: Progress | None = None,
    tokenizer: Path | None = None,
) -> ModelReport:
    """Write a GGUF of random weights to `out`, which must not exist and must end in .gguf.

    `quant` is a llama.cpp file type (f32, f16, bf16, q8_0, q4_k_m, …). `tokenizer` is the GGUF whose tokenizer is
    taken, the built-in model's by default. `progress` is called now and then with the parameters done and their total.

    Raises InvalidRequest for an unknown shape or quantisation, a bad `out` or a tokenizer larger than the shape's
    vocabulary, ModelError if the tokenizer cannot be read or the file cannot be written. Nothing is left behind then.
    """
    began = time.perf_counter()
    shape = shape_named(shape) if isinstance(shape, str) else shape
    quantisation = quantisation_named(quant)
    if seed < 0:
        raise InvalidRequest(f"expected a seed of 0 or more, got {seed}", param="seed")
    out = Path(out)
    with _file_errors(out):
        _check_target(out)
    vocabulary = read_vocabulary(tokenizer or locate(BUILTIN))
    if shape.vocabulary is not None:
        vocabulary = vocabulary.padded(shape.vocabulary)
    parameters = sum(tensor.num_values for tensor in tensors(shape, len(vocabulary)))
    with _file_errors(out), _whole_or_nothing(out) as (draft, floats):
        _check_space(out, parameters, quantisation)
        _write(shape, vocabulary, quantisation, draft, floats, seed, progress or _ignore)
        num_bytes = draft.stat().st_size
    return ModelReport(
        path=out,
        shape=shape.name,
        arch=shape.arch,
        quant=quantisation.name,
        parameters=parameters,
        vocabulary=len(vocabulary),
        padding_tokens=vocabulary.num_padding,
        bytes=num_bytes,
        seconds=time.perf_counter() - began,
        seed=seed,
    )


def _ignore(done: int, total: int) -> None:
    pass


def _check_target(out: Path) -> None:
    if out.suffix != ".gguf":
        raise InvalidRequest(f"expected a file name that ends in .gguf, got {out.name!r}", param="out")
    if out.exists() or out.is_symlink():
        raise InvalidRequest(f"{out} exists already; delete it or choose another name", param="out")
    if not out.parent.is_dir():
        raise InvalidRequest(f"the folder {out.parent} does not exist; make it first", param="out")


def _check_space(out: Path, parameters: int, quantisation: Quantisation) -> None:
    """Refuse before a long run what the disk cannot hold. A quantised file needs the f16 one beside it."""
    per_parameter = {"f32": 4, "f16": 2, "bf16": 2}.get(quantisation.name, 2 + 1.07)
    needed, free = parameters * per_parameter, shutil.disk_usage(out.parent).free
    if needed > free:
        raise ModelError(f"{out.parent} has {free / 1e9:.1f} GB free; this model needs {needed / 1e9:.1f} GB to make")


@contextmanager
def _file_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ModelError(f"the disk of {out.parent} is full; nothing was kept") from error
        raise ModelError(f"cannot write {out}: {error.strerror or error}") from error


@contextmanager
def _whole_or_nothing(out: Path) -> Iterator[tuple[Path, Path]]:
    """Two names beside `out` to write to; the first becomes `out` at the end, and none is left if anything fails."""
    draft, floats = (out.with_name(f".{out.stem}.{os.getpid()}.{part}.gguf") for part in ("draft", "floats"))
    try:
        yield draft, floats
        draft.replace(out)
    finally:
        for leftover in (draft, floats):
            with suppress(OSError):
                leftover.unlink(missing_ok=True)


def _write(
    shape: Shape,
    vocabulary: Vocabulary,
    quantisation: Quantisation,
    draft: Path,
    floats: Path,
    seed: int,
    progress: Progress,
) -> None:
    if quantisation.is_plain:
        _write_floats(draft, shape, vocabulary, quantisation, seed, progress)
        return
    total = sum(tensor.num_values for tensor in tensors(shape, len(vocabulary)))
    half = known_quantisations()["f16"]
    _write_floats(floats, shape, vocabulary, half, seed, lambda done, _: progress(done, 2 * total))
    quantise(floats, draft, quantisation, progress=lambda share: progress(total + round(share * total), 2 * total))


def _write_floats(
    path: Path, shape: Shape, vocabulary: Vocabulary, kind: Quantisation, seed: int, progress: Progress
) -> None:
    """Write the whole GGUF with its matrices in `kind` and its vectors in f32."""
    writer = gguf.GGUFWriter(None, shape.arch)
    try:
        write_metadata(writer, shape, len(vocabulary))
        writer.add_file_type(kind.file_type)
        vocabulary.write(writer)
        plan = list(tensors(shape, len(vocabulary)))
        for tensor in plan:
            name = "f32" if tensor.single else kind.name
            size = 4 if name == "f32" else 2
            data_type = gguf.GGMLQuantizationType[name.upper()]
            writer.add_tensor_info(tensor.name, tensor.shape, np.float32, tensor.num_values * size, data_type)
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        _write_data(writer, plan, kind, seed, vocabulary.num_padding, progress)
    finally:
        writer.close()


def _write_data(
    writer: gguf.GGUFWriter, plan: list[Tensor], kind: Quantisation, seed: int, num_padding: int, progress: Progress
) -> None:
    file: IO[bytes] = writer.fout[0]
    done, total = 0, sum(tensor.num_values for tensor in plan)
    writer.write_padding(file, file.tell())
    for tensor in plan:
        name = "f32" if tensor.single else kind.name
        for piece in _pieces(tensor, seed, num_padding):
            file.write(_encode(piece, name).data)
            done += piece.size
            progress(done, total)
        writer.write_padding(file, file.tell())


def _pieces(tensor: Tensor, seed: int, num_padding: int) -> Iterator[npt.NDArray[np.float32]]:
    """The tensor's numbers in order, flat, a few million at a time; each piece is valid until the next is asked for."""
    if tensor.values is not None:
        yield np.ascontiguousarray(tensor.values, dtype=np.float32).reshape(-1)
        return
    name_digest = hashlib.blake2b(tensor.name.encode(), digest_size=8).digest()
    generator = np.random.default_rng([seed, int.from_bytes(name_digest, "little")])
    buffer = np.empty(min(tensor.num_values, _PIECE_VALUES), dtype=np.float32)
    num_loud = tensor.num_values - (num_padding * tensor.shape[1] if tensor.makes_logits else 0)
    for start in range(0, tensor.num_values, buffer.size):
        piece = buffer[: tensor.num_values - start]
        generator.standard_normal(dtype=np.float32, out=piece)
        piece *= np.float32(tensor.spread)
        piece += np.float32(tensor.mean)
        piece[max(0, num_loud - start) :] *= np.float32(PADDING_LOUDNESS)
        yield piece


def _encode(values: npt.NDArray[np.float32], kind: str) -> npt.NDArray[np.generic]:
    if kind == "f32":
        return values.astype("<f4", copy=False)
    if kind == "f16":
        return values.astype("<f2")
    bits = values.view(np.uint32)  # bf16 is the upper half of an f32, rounded to even; random weights have no NaN
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (rounded >> np.uint32(16)).astype("<u2")
