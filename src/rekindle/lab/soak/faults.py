"""Bad luck for a folder of stored blocks: it vanishes, can't be written, loses files, and holds rubbish.

None of it may reach a request. What can't be done, such as taking rights away from root, is left out.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_SAMPLE = 20  # files that one misfortune meets


class Misfortune:
    """Does something bad to a folder at each call, and something good again at the next."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder = folder
        self._random = random.Random(seed)
        self._mend: Callable[[], None] | None = None
        self.counts: dict[str, int] = {}

    def strike(self) -> None:
        """One more."""
        if self._mend is not None:
            self.mend()
            return
        name, harm = self._random.choice(
            (
                ("vanished", self._vanish),
                ("could not be written", self._forbid),
                ("became a file", self._replace),
                ("lost files", self._delete),
                ("held torn files", self._tear),
                ("held changed files", self._change),
            )
        )
        with suppress(OSError):  # the server may just be working there
            harm()
            self.counts[name] = self.counts.get(name, 0) + 1

    def mend(self) -> None:
        """Undo what can be undone."""
        mend, self._mend = self._mend, None
        if mend is not None:
            with suppress(OSError):
                mend()

    def _vanish(self) -> None:
        aside = self._folder.with_name(f"{self._folder.name}-gone")
        self._folder.rename(aside)

        def back() -> None:
            if self._folder.exists():  # made anew meanwhile
                shutil.rmtree(aside)
            else:
                aside.rename(self._folder)

        self._mend = back

    def _replace(self) -> None:
        shutil.rmtree(self._folder)
        self._folder.write_text("not a folder")
        self._mend = self._folder.unlink

    def _forbid(self) -> None:
        mode = self._folder.stat().st_mode
        self._folder.chmod(0o500)
        self._mend = lambda: self._folder.chmod(mode)

    def _files(self) -> list[Path]:
        found = [path for path in self._folder.rglob("*") if path.is_file()]
        return self._random.sample(found, min(_SAMPLE, len(found)))

    def _delete(self) -> None:
        for path in self._files():
            path.unlink(missing_ok=True)

    def _tear(self) -> None:
        for path in self._files():
            os.truncate(path, path.stat().st_size // 2)

    def _change(self) -> None:
        for path in self._files():
            with path.open("r+b") as file:
                file.seek(self._random.randrange(max(1, path.stat().st_size)))
                file.write(b"\xff\x00\xff")
