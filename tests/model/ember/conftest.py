"""Ember's tokenizer and committed weights, loaded once."""

from collections.abc import Mapping
from typing import Any

import pytest

from rekindle.model.ember import hf_path


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    pytest.importorskip("tokenizers")
    from rekindle.model.ember.tokenizer import load_tokenizer

    return load_tokenizer(hf_path() / "tokenizer.json")


@pytest.fixture(scope="session")
def ids(tokenizer: Any) -> Mapping[str, int]:
    from rekindle.model.ember.tokenizer import piece_ids

    return piece_ids(tokenizer)


@pytest.fixture(scope="session")
def network() -> Any:
    pytest.importorskip("torch")
    from rekindle.model.ember.network import load_network

    return load_network(hf_path()).eval()
