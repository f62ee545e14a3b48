"""The server of a soak, in a process of its own: `rekindle serve` but for its words, and a recount before it closes.

    python -m rekindle.lab.soak.server '{"threads": 1, "context": 1024}'

It prints its URL, and serves until SIGTERM. Then it recounts engine, memory and disk from scratch; whoever made files unfit
has to have had them set aside before. What is wrong is printed too, and makes the exit code `WRONG`.
"""

from __future__ import annotations

import json
import logging
import sys
from contextlib import closing

from rekindle.api.server import serve
from rekindle.serve.service import Service
from rekindle.settings import Settings

WRONG = 3


def main() -> int:
    logging.basicConfig(level=logging.ERROR)
    settings = Settings.load(None, **json.loads(sys.argv[1]))
    with closing(Service.open(settings)) as service:
        serve(service, settings.host, settings.port, lambda url: print(url, flush=True))  # noqa: T201
        try:
            service.check_integrity()
        except AssertionError as error:
            print(error, flush=True)  # noqa: T201
            logging.exception("the recount found what is wrong")
            return WRONG
    return 0


if __name__ == "__main__":
    sys.exit(main())
