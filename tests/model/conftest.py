"""Small models of real architectures, made once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from functools import cache
from pathlib import Path

import pytest

from rekindle.lab.models import make_model
from rekindle.model import ember
from rekindle.model.gguf import GgufModel
from rekindle.model.tokenizer import GgufTokenizer

Maker = Callable[[str], Path]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """The file of a shape of the lab, with random weights."""
    folder = tmp_path_factory.mktemp("models")

    @cache
    def make(shape: str) -> Path:
        return make_model(shape, "f16", folder / f"{shape}.gguf").path

    return make


@pytest.fixture(scope="session")
def tokenizer() -> Iterator[GgufTokenizer]:
    """The built-in model's."""
    with closing(GgufModel(ember.weights_path(), vocab_only=True)) as model:
        yield GgufTokenizer(model)
