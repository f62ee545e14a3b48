"""llama.cpp's own server out of the xllamacpp wheel, in a process of its own.

    python -m rekindle.lab.load.peer_process '{"model": "m.gguf", "threads": 2, "context": 4096, "parallel": 4}'

It prints one line of JSON with its URL and what its kernels were built for, and serves until SIGTERM. `options` sets
further fields of llama.cpp's `common_params`.
"""

from __future__ import annotations

import json
import signal
import sys
from typing import Any

from xllamacpp import CommonParams, Server, __version__, get_system_info


def params_of(wish: dict[str, Any]) -> CommonParams:
    """Only what a comparison has to fix; the rest is llama-server's default."""
    params = CommonParams()
    params.model.path = wish["model"]
    params.n_ctx = wish["context"]
    params.n_parallel = wish["parallel"]
    params.kv_unified = True  # what llama-server does unless it is told otherwise: any slot may use the whole context
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = wish["threads"]
    params.n_gpu_layers = 0
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.cors_origins = ""
    for name, value in wish.get("options", {}).items():
        if not hasattr(params, name):
            raise SystemExit(f"llama.cpp's common_params has no field {name!r}")
        setattr(params, name, value)
    return params


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    server = Server(params_of(json.loads(sys.argv[1])))
    about = {"url": server.listening_address, "build": f"xllamacpp {__version__}", "kernels": get_system_info()}
    print(json.dumps(about), flush=True)  # noqa: T201
    while server:  # it stops when it is let go
        signal.pause()


if __name__ == "__main__":
    main()
