"""A program for the tests: exports a merged model once its memory is being watched.

    python export_memory.py BASE ADAPTER OUTPUT

It prints ``ready`` once JAX runs, waits for a line, exports, prints ``done`` and waits again.
"""

from __future__ import annotations

import contextlib
import io
import sys

import jax
import jax.numpy as jnp

from smoa_jax.checkpoint.export.huggingface import export_stored  # noqa: F401 (imported before)
from smoa_jax.commands.export import export


def main() -> None:
    base, adapter, output = sys.argv[1:]
    jax.block_until_ready(jnp.ones((256, 256)) @ jnp.ones((256, 256)))
    print("ready", flush=True)
    sys.stdin.readline()
    with contextlib.redirect_stdout(io.StringIO()):
        export(
            model=base,
            adapter=adapter,
            output=output,
            max_shard_bytes=1 << 20,
            spectra_cache_dir="off",
        )
    print("done", flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    main()
