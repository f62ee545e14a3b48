"""The Python API: mistakes are told in its own words, and its names can be found."""

from __future__ import annotations

import pytest

import rekindle
from rekindle.errors import InvalidRequest


@pytest.mark.parametrize(
    ("wrong", "message"), [("max_new_tokens", "did you mean 'max_tokens'"), ("beams", "known: .*top_p")]
)
def test_an_unknown_option_of_an_answer_is_told(wrong: str, message: str) -> None:
    with rekindle.load(engine="toy", store="none") as llm:
        with pytest.raises(InvalidRequest, match=f"unknown option '{wrong}'.*{message}"):
            llm.generate("Hello", **{wrong: 3})
        assert llm.generate("Hello", max_tokens=2, seed=1, top_p=0.5) == llm.generate("Hello", max_tokens=2)


def test_names_that_are_loaded_late_can_be_completed() -> None:
    listed = dir(rekindle)
    assert {"LLM", "SimpleKVCache", "load", "__version__"} <= set(listed)
    assert all(hasattr(rekindle, name) for name in rekindle.__all__)
    assert "import_module" not in listed
