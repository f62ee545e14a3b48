"""The example that ships with Rekindle: passages about a village, and questions with their answers.

In a clone it is `examples/village`; the wheel carries a copy inside the package.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import rekindle
from rekindle.errors import RekindleError


@dataclass(frozen=True)
class Question:
    """A question about the passages."""

    text: str
    answer: str
    kind: str


@dataclass(frozen=True)
class Village:
    """The example, read."""

    passages: tuple[str, ...]  # in order: one may refer to a name in the one before
    questions: tuple[Question, ...]

    @property
    def text(self) -> str:
        return "\n".join(self.passages)

    def first(self, kind: str, *, after: int = 0) -> Question:
        """The question number `after` (from 0) of a kind."""
        return [question for question in self.questions if question.kind == kind][after]


def village_folder() -> Path:
    """Where the example is. Raises RekindleError if this installation lacks it."""
    package = Path(rekindle.__file__).parent
    for folder in (package / "examples" / "village", package.parent.parent / "examples" / "village"):
        if (folder / "questions.json").is_file():
            return folder
    raise RekindleError("this installation has no example texts; reinstall rekindle, or run it from a clone")


def read_village(folder: Path | None = None) -> Village:
    """The passages in the order of their names, and the questions."""
    folder = folder or village_folder()
    passages = tuple(path.read_text("utf-8").strip() for path in sorted(folder.glob("*.txt")))
    questions = json.loads((folder / "questions.json").read_text("utf-8"))
    return Village(passages, tuple(Question(each["question"], each["answer"], each["kind"]) for each in questions))
