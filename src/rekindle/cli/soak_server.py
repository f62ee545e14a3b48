"""The server of a soak, in a process of its own: `rekindle serve`, and a recount before it closes.

    python -m rekindle.cli.soak_server '{"threads": 1, "context": 1024}'

When it was asked to end and nobody is answered any more, it recounts engine, memory and disk from scratch; files that are
not what was written have to have been set aside before. What is wrong is printed, and makes the exit code `WRONG`.
"""

from __future__ import annotations

import json
import sys
import traceback

from rekindle.cli.serve import run_server
from rekindle.lab.soak.run import WRONG
from rekindle.serve.service import Service
from rekindle.settings import Settings


def main() -> int:
    problems: list[str] = []

    def recount(service: Service) -> None:
        try:
            service.check_integrity()
        except AssertionError as error:
            traceback.print_exc()
            problems.append(str(error))

    run_server(Settings.load(None, **json.loads(sys.argv[1])), at_end=recount)
    print(*problems, flush=True)  # noqa: T201
    return WRONG if problems else 0


if __name__ == "__main__":
    sys.exit(main())
