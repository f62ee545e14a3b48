"""A folder in the Hugging Face layout, looked at but not loaded: config, safetensors, tokenizer and template files.

    config.json                      architecture and shape
    generation_config.json           which tokens end an answer
    model.safetensors                weights; or model-00001-of-00003.safetensors … and model.safetensors.index.json
    tokenizer.json                   see `hf_tokenizer`
    tokenizer_config.json, chat_template.jinja

Only data is read. Weights are taken from safetensors alone, because other formats are pickles, and loading a pickle runs
code; and code that comes with a model (`auto_map` in its config) is never run, whatever it is asked for.

What is damaged is told before transformers sees it: safetensors' own reader checks each file's table of tensors against
its length without reading the weights.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from rekindle.errors import ModelError

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
_SMALL = (  # what a model has beside its weights, and is read here
    CONFIG,
    INDEX,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
_PICKLES = ("*.bin", "*.pt", "*.pth")
_POINTER = b"version https://git-lfs"
_DEFAULT_CONTEXT = 4096  # where a config says nothing


def files_of_model(names: Iterable[str]) -> list[str]:
    """Of a repository's files those that make up a safetensors model, config.json first; none if there is no such."""
    known = set(names)
    weights = sorted(name for name in known if _WEIGHTS.fullmatch(name))
    return [*(name for name in _SMALL if name in known), *weights] if CONFIG in known and weights else []


class HfModel:
    """The facts about the model in a folder. Holds no weights; see `hf_load.load_weights`."""

    def __init__(self, path: Path) -> None:
        """Raises ModelError if something is missing, torn or in another format."""
        self.path = path
        _check_folder(path)
        self.config: dict[str, Any] = self._json(CONFIG)
        self.weight_files = self._find_weights()
        self._tensors = [tensor for file in self.weight_files for tensor in _tensors(file)]
        if not self._tensors:
            raise ModelError(f"{path} holds no tensors; get the model again from where it came")

    @property
    def loaded_files(self) -> list[Path]:
        """What the loaded weights depend on."""
        return [self.path / CONFIG, *self.weight_files]

    @property
    def architecture(self) -> str:
        """As transformers calls it, e.g. "llama"."""
        return str(self._text_config.get("model_type") or self.config.get("model_type") or "unknown")

    @property
    def num_parameters(self) -> int:
        return sum(prod(shape) for shape, _, _ in self._tensors)

    @property
    def size_bytes(self) -> int:
        """Of the weight files."""
        return sum(file.stat().st_size for file in self.weight_files)

    @property
    def dtype(self) -> str:
        """The type of most of the weights, as safetensors calls it: "BF16", "F16", "F32" …"""
        counts: dict[str, int] = {}
        for shape, dtype, _ in self._tensors:
            counts[dtype] = counts.get(dtype, 0) + prod(shape)
        return max(counts, key=lambda each: counts[each])

    @property
    def vocab_size(self) -> int | None:
        """What its config says, or else the rows of its embeddings; None where those have a name that is not known."""
        stated = self._text_config.get("vocab_size")
        rows = (shape[0] for shape, _, name in self._tensors if name.endswith(_EMBEDDINGS) and len(shape) == 2)
        return stated if isinstance(stated, int) else next(rows, None)

    @property
    def train_context(self) -> int:
        """Tokens it was trained to see, or a usual number if its config does not say."""
        stated = (self._text_config.get(key) for key in ("max_position_embeddings", "n_positions", "seq_length"))
        return next((int(value) for value in stated if isinstance(value, int) and value > 0), _DEFAULT_CONTEXT)

    @property
    def tokenizer_config(self) -> dict[str, Any]:
        return self._json("tokenizer_config.json", optional=True)

    @property
    def end_tokens(self) -> frozenset[int]:
        """What ends an answer, by generation_config.json or else config.json."""
        for source in (self.generation_config, self.config, self._text_config):
            stated = source.get("eos_token_id")
            if stated is not None:
                return frozenset(int(each) for each in (stated if isinstance(stated, list) else [stated]))
        return frozenset()

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        return self._json("generation_config.json", optional=True)

    @property
    def begin_token(self) -> int | None:
        stated = (source.get("bos_token_id") for source in (self.generation_config, self.config, self._text_config))
        return next((int(each) for each in stated if isinstance(each, int)), None)

    @property
    def chat_template(self) -> str | None:
        """Jinja source: chat_template.jinja, or what tokenizer_config.json says; of several the one for every day."""
        file = self.path / "chat_template.jinja"
        if file.is_file():
            return _read(file).decode("utf-8", "replace")
        stated = self.tokenizer_config.get("chat_template")
        if isinstance(stated, list):  # {"name": …, "template": …}
            named = {each.get("name"): each.get("template") for each in stated if isinstance(each, dict)}
            stated = named.get("default") or next(iter(named.values()), None)
        return stated if isinstance(stated, str) else None

    @property
    def _text_config(self) -> dict[str, Any]:
        """Of a model that also sees or hears, the part that reads text."""
        inner = self.config.get("text_config")
        return inner if isinstance(inner, dict) else self.config

    def _json(self, name: str, *, optional: bool = False) -> dict[str, Any]:
        file = self.path / name
        if optional and not file.is_file():
            return {}
        try:
            content = json.loads(_read(file))
        except (ValueError, RecursionError) as error:
            raise ModelError(f"{file} is not JSON: {error}; get it again from where it came") from None
        if not isinstance(content, dict):
            raise ModelError(f"{file} is not a JSON object; get it again from where it came")
        return content

    def _find_weights(self) -> list[Path]:
        whole = self.path / "model.safetensors"
        if whole.is_file():
            return [whole]
        if not (self.path / INDEX).is_file():
            raise ModelError(self._no_weights())
        listed = self._json(INDEX).get("weight_map")
        if not isinstance(listed, dict) or not listed:
            raise ModelError(f"{self.path / INDEX} lists no weights; get it again from where it came")
        names = sorted({str(name) for name in listed.values()})
        if odd := [name for name in names if not _WEIGHTS.fullmatch(name)]:
            raise ModelError(f"{self.path / INDEX} names {odd[0]!r}, expected model-…-of-….safetensors")
        if missing := [name for name in names if not (self.path / name).is_file()]:
            raise ModelError(
                f"{self.path} lacks {len(missing)} of {len(names)} weight files ({', '.join(missing[:3])}); "
                "get them from where the others came"
            )
        return [self.path / name for name in names]

    def _no_weights(self) -> str:
        expected = f"expected model.safetensors, or {INDEX} and the files that it lists"
        if any(next(self.path.glob(pattern), None) for pattern in _PICKLES):
            return (
                f"{self.path} holds weights only as pickles, which Rekindle does not load, because that runs code; "
                f"{expected}: save the model with save_pretrained, or get its safetensors"
            )
        return f"{self.path} holds no weights; {expected}"


def _check_folder(path: Path) -> None:
    """Raises ModelError with what to do instead, if this is no model."""
    if (path / CONFIG).is_file():
        return
    here = sorted(each.name for each in path.glob("*.gguf"))
    hint = f"; it holds {here[0]}, whose path would be a model" if here else ""
    raise ModelError(
        f"{path} is a folder without config.json; expected the path of a .gguf file, or of a folder with "
        f"config.json, *.safetensors and tokenizer.json{hint}"
    )


def _tensors(file: Path) -> list[tuple[list[int], str, str]]:
    """Shape, type and name of each tensor in a file. Raises ModelError if the file is torn or something else."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "numpy") as opened:
            slices = ((opened.get_slice(name), name) for name in opened.keys())  # noqa: SIM118 (it is no mapping)
            return [(each.get_shape(), each.get_dtype(), name) for each, name in slices]
    except (SafetensorError, OSError) as error:
        raise ModelError(_why_not(file, error)) from None


def _why_not(file: Path, error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"cannot read {file}: {error.strerror}"
    try:
        with file.open("rb") as opened:
            start = opened.read(len(_POINTER))
    except OSError:
        start = b""
    if start == _POINTER:
        return f"{file} is a Git LFS pointer and not the file itself; run git lfs pull where it was cloned"
    return f"{file} is cut off or damaged ({error}); get it again from where it came"


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ModelError(f"cannot read {file}: {error.strerror}") from None
