"""Reading GGUF metadata: the format's corners, written byte by byte."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.model.conftest import Maker

from rekindle.errors import ModelError
from rekindle.model.header import read_header

U32, F32, STRING, ARRAY, U64 = 4, 6, 8, 9, 10


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def field(key: bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def array(kind: int, length: int, values: bytes) -> bytes:
    return struct.pack("<IQ", kind, length) + values


def write(path: Path, *fields: bytes, version: int = 3, count: int | None = None) -> Path:
    number = len(fields) if count is None else count
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", version, 0, number) + b"".join(fields))
    return path


def refused(path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        read_header(path)
    return str(caught.value)


def test_numbers_text_and_short_arrays_are_read(tmp_path: Path) -> None:
    path = write(
        tmp_path / "m.gguf",
        field(b"general.architecture", STRING, text(b"llama")),
        field(b"a", U32, struct.pack("<I", 7)),
        field(b"b", F32, struct.pack("<f", 0.5)),
        field(b"c", ARRAY, array(U64, 3, struct.pack("<3Q", 1, 2, 3))),
        field(b"d", ARRAY, array(U32, 0, b"")),
        field(b"names", ARRAY, array(STRING, 2, text(b"x") + text(b"x"))),
        field(b"long", ARRAY, array(U32, 2000, bytes(8000))),
        field(b"last", 7, b"\1"),
        field(b"\xff", STRING, text(b"\xfe")),
    )
    expected = {
        "general.architecture": "llama",
        "a": 7,
        "b": 0.5,
        "c": (1, 2, 3),
        "d": (),
        "last": True,
        "\ufffd": "\ufffd",
    }
    assert read_header(path) == expected


def test_it_reads_what_the_gguf_package_reads(tiny: Maker) -> None:
    reader = gguf.GGUFReader(tiny("tiny-hybrid"))
    header = read_header(tiny("tiny-hybrid"))
    for key, value in header.items():
        stated = reader.fields[key].contents()
        assert value == (tuple(stated) if isinstance(stated, list) else stated), key
    assert header["lfm2.attention.head_count_kv"] == (0, 2, 0, 2)


@pytest.mark.parametrize("version", [0, 1, 4, 0x03000000])
def test_other_versions_are_left_to_llama_cpp(tmp_path: Path, version: int) -> None:
    assert read_header(write(tmp_path / "m.gguf", version=version)) == {}


@pytest.mark.parametrize(
    "fields",
    [
        [],
        [field(b"a", 99, b"")],
        [field(b"a", ARRAY, array(ARRAY, 1, b""))],
        [field(b"a", ARRAY, array(U32, 1 << 62, b""))],
        [field(b"a", ARRAY, array(STRING, 1 << 62, b""))],
        [field(b"a", STRING, struct.pack("<Q", (1 << 64) - 1))],
        [field(b"a", ARRAY, array(STRING, 2, struct.pack("<Q", (1 << 64) - 1)))],
        [struct.pack("<Q", 1 << 63)],
    ],
)
def test_lengths_beyond_the_end_are_refused(tmp_path: Path, fields: list[bytes]) -> None:
    assert "get it again" in refused(write(tmp_path / "m.gguf", *fields, count=len(fields) + 1))


def test_empty_tokens_may_repeat_and_others_not(tmp_path: Path) -> None:
    tokens = b"tokenizer.ggml.tokens"
    read_header(write(tmp_path / "m.gguf", field(tokens, ARRAY, array(STRING, 3, text(b"") + text(b"a") + text(b"")))))
    twice = write(tmp_path / "n.gguf", field(tokens, ARRAY, array(STRING, 3, text(b"a") + text(b"b") + text(b"a"))))
    assert "token 2, 'a', is there twice" in refused(twice)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.binary(max_size=300))
def test_any_bytes_are_read_or_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF\3\0\0\0" + data)
    try:
        read_header(path)
    except ModelError as error:
        assert "get it again" in str(error)
