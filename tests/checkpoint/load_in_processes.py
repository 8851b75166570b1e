"""A program for the tests: one of several processes loads a base and counts what it reads."""

from __future__ import annotations

import sys

import jax
import numpy as np

from smoa_jax.checkpoint.base import abstract_base, load_base
from smoa_jax.checkpoint.huggingface.safetensors_files import SafetensorsFiles
from smoa_jax.sharding.mesh import MeshConfig, make_mesh
from smoa_jax.sharding.rules import param_shardings
from tests.checkpoint.hf_files import CONFIG, expected_tree, llama_tensors
from tests.processes import join, report


def main() -> None:
    (directory,) = join()
    read: dict[str, int] = {}
    original = SafetensorsFiles.read

    def counted(self, name, index):
        values = original(self, name, index)
        read[name] = read.get(name, 0) + values.nbytes
        return values

    SafetensorsFiles.read = counted
    mesh = make_mesh(MeshConfig(tensor=2))
    base = load_base(directory, shardings=param_shardings(abstract_base(directory).params, mesh))
    wanted = expected_tree(CONFIG, llama_tensors(CONFIG))

    def check(leaf, values):
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(shard.data, values[shard.index])

    jax.tree.map(check, base.params, wanted)
    report({"read": read, "fingerprint": base.fingerprint, "devices": jax.device_count()})


if __name__ == "__main__":
    sys.exit(main())
