"""A program for the tests: loads a base and says how many bytes its arrays hold.

    python load_memory.py DIRECTORY DTYPE fsdp|single

It prints ``ready`` once JAX runs, waits for a line, loads, prints the outcome as JSON and waits
again, so that whoever started it can watch its memory from outside in between.
"""

from __future__ import annotations

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from smoa_jax.checkpoint.base import abstract_base, load_base
from smoa_jax.sharding.mesh import MeshConfig, make_mesh
from smoa_jax.sharding.rules import param_shardings


def main() -> None:
    directory, dtype, layout = sys.argv[1:]
    abstract = abstract_base(directory, dtype).params
    shardings = None
    if layout == "fsdp":
        shardings = param_shardings(abstract, make_mesh(MeshConfig()))
    for device in jax.devices():  # start the runtime's threads and allocators
        jax.block_until_ready(jax.device_put(np.ones((256, 256), jnp.dtype(dtype)), device))
    print("ready", flush=True)
    sys.stdin.readline()
    params = load_base(directory, dtype, shardings).params
    shards = [shard.data for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards]
    # Replicas may share one buffer; count every byte once.
    buffers = {shard.unsafe_buffer_pointer(): shard.nbytes for shard in shards}
    stacked = [leaf for leaf in jax.tree.leaves(params["layers"]) if leaf.ndim == 3]
    largest = max(shard.data.nbytes for leaf in stacked for shard in leaf.addressable_shards)
    print(json.dumps({"arrays": sum(buffers.values()), "largest_shard": largest}), flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    main()
