"""Quantisations by the names people write, done by llama.cpp itself.

llama.cpp names its file types in an enum (`LLAMA_FTYPE_MOSTLY_Q4_K_M`); people write `q4_k_m`. The list of names is
read from the installed binding, so that it is always the one that this llama.cpp can make. Types that need an
importance matrix are refused: such a matrix is measured on a trained model's activations, and random weights have none
worth measuring.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import llama_cpp

from rekindle.errors import InvalidRequest, ModelError, nearest
from rekindle.lab.machine import usable_cores

# what to take instead, about the same number of bits per weight
_NEEDS_IMPORTANCE = {
    "iq1_s": "q2_k",
    "iq1_m": "q2_k",
    "iq2_xxs": "q2_k",
    "iq2_xs": "q2_k",
    "iq2_s": "q2_k",
    "iq2_m": "q2_k",
    "q2_k_s": "q2_k",
    "iq3_xxs": "iq3_s",
    "iq3_xs": "iq3_s",
}
# in the enum, but llama.cpp's quantiser has no such output; only models published in that type have it
_READ_ONLY = {"nvfp4"}
_SHORT_NAMES = {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"}

_PROGRESS_LINE = re.compile(r"\s*\[\s*(\d+)/\s*(\d+)\]")


@dataclass(frozen=True)
class Quantisation:
    """One of llama.cpp's file types."""

    name: str  # as users write it: q4_k_m
    file_type: int  # llama.cpp's number for it

    @property
    def is_plain(self) -> bool:
        """Whether the weights are floats that can be written as they are, with no quantiser."""
        return self.name in ("f32", "f16", "bf16")


def known_quantisations() -> dict[str, Quantisation]:
    """Every quantisation that the installed llama.cpp can make from random weights, by name."""
    pattern = re.compile(r"LLAMA_FTYPE_(?:ALL|MOSTLY)_(\w+)")
    matches = ((pattern.fullmatch(name), name) for name in dir(llama_cpp))
    found = {match[1].casefold(): int(getattr(llama_cpp, name)) for match, name in matches if match}
    return {
        name: Quantisation(name, number)
        for name, number in sorted(found.items())
        if name not in _NEEDS_IMPORTANCE and name not in _READ_ONLY
    }


def quantisation_named(name: str) -> Quantisation:
    """The quantisation that a user means by `q4_k_m`, `Q4_K_M` or `q4-k-m`. Raises InvalidRequest if there is none."""
    plain = name.casefold().replace("-", "_")
    plain = _SHORT_NAMES.get(plain, plain)
    if plain in _NEEDS_IMPORTANCE:
        raise InvalidRequest(
            f"{plain} needs an importance matrix, which random weights cannot have; use {_NEEDS_IMPORTANCE[plain]}",
            param="quant",
        )
    known = known_quantisations()
    if plain not in known:
        raise InvalidRequest(f"no quantisation is called {name!r}{nearest(plain, known)}", param="quant")
    return known[plain]


def quantise(source: Path, target: Path, quantisation: Quantisation, *, progress: Callable[[float], None]) -> None:
    """Quantise a GGUF of floats into `target`, which is overwritten; `progress` gets the share done, 0 to 1.

    Raises ModelError with llama.cpp's own last words if it fails; then `target` may hold a part of the file.
    """
    program = Path(__file__).with_name("quantiser.py")
    arguments = (source, target, quantisation.file_type, usable_cores())
    command = [sys.executable, "-P", str(program), *map(str, arguments)]
    last_lines: deque[str] = deque(maxlen=3)
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    ) as process:
        assert process.stderr is not None
        try:
            for line in process.stderr:
                if match := _PROGRESS_LINE.match(line):
                    progress(int(match[1]) / int(match[2]))
                elif line.strip(" .\n"):
                    last_lines.append(line.strip())
        except BaseException:
            process.kill()
            raise
    if process.returncode != 0:
        raise ModelError(f"llama.cpp could not quantise to {quantisation.name}: {'; '.join(last_lines)}")
