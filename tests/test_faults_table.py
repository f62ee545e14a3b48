"""docs/faults.md names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")


def test_every_fault_has_its_test() -> None:
    rows = [line for line in (REPOSITORY / "docs" / "faults.md").read_text("utf-8").splitlines() if "`tests/" in line]
    named = [NAMED.findall(line) for line in rows if line.startswith("|")]
    assert len(named) > 15 and all(named), "a row without a test"
    for file, test in {each for row in named for each in row}:
        assert f"def {test}(" in (REPOSITORY / file).read_text("utf-8"), f"{file} has no {test}"
