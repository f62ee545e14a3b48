"""The village: a dozen passages and some questions about them, for examples, demos and tests.

It is one held-out document (ember was not trained on its pairs of names and values), cut into twelve passages. Several
begin with "This one", whose subject stands in the passage before.
"""

import json
from pathlib import Path

from rekindle.model.ember.language import Document, Kind, generate_document, generate_questions, recut

_SEED, _PEOPLE, _CUT = "village 75973", 9, 55513  # Vodris belongs to Nouraix, Nouraix is based in Viniton
_COUNTS = {Kind.DIRECT: 6, Kind.COREFERENCE: 6, Kind.TWO_HOP: 6, Kind.REVERSE: 3, Kind.UNSTATED: 3}


def village() -> Document:
    """The document of the village."""
    return recut(generate_document(_SEED, num_people=_PEOPLE), _CUT)


def write_village(folder: Path) -> None:
    """Write `passage-01.txt` … and `questions.json` into the folder."""
    document = village()
    folder.mkdir(parents=True, exist_ok=True)
    files = [f"passage-{number:02d}.txt" for number in range(1, len(document.passages) + 1)]
    for name, text in zip(files, document.passages, strict=True):
        (folder / name).write_text(text + "\n")
    questions = [
        {
            "question": question.text,
            "answer": question.answer,
            "kind": question.kind.value,
            "passages": [files[number] for number in question.passages],
        }
        for kind, count in _COUNTS.items()
        for question in generate_questions(document, "village", kinds=(kind,), count=count)
    ]
    (folder / "questions.json").write_text(json.dumps(questions, indent=2) + "\n")
