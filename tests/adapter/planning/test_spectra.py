"""Planning: what the cache keeps, how layers are laid out, and how processes share them."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from smoa_jax.adapter.config import SmoaConfig
from smoa_jax.adapter.planning import spectra as planning
from smoa_jax.adapter.planning.spectra import plan_spectra
from smoa_jax.adapter.tree import apply_smoa
from tests.adapter.planning.plan_in_processes import CONFIGS, base_params, outcome_of
from tests.processes import run_processes

BLOCKS = SmoaConfig(rank=6, target_modules=["q_proj"])
BANDS = SmoaConfig(rank=6, partition="spectral_bands", target_modules=["q_proj"])


def two_layers(seed: int = 0, dtype=np.float32) -> dict:
    weights = np.random.default_rng(seed).standard_normal((2, 12, 20))
    return {"q_proj": {"kernel": jnp.asarray(weights, dtype)}}


@pytest.fixture
def decomposed(monkeypatch):
    """The shapes of the layers that were decomposed, rather than found in a cache."""
    seen = []
    scores, bands = planning.layer_scores, planning.layer_bands
    monkeypatch.setattr(planning, "layer_scores", lambda w: seen.append(w.shape) or scores(w))
    monkeypatch.setattr(planning, "layer_bands", lambda w, *a: seen.append(w.shape) or bands(w, *a))
    return seen


def plan(params, config, cache_dir):
    """The spectra, with any warning being an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return plan_spectra(params, config, cache_dir=cache_dir)


def assert_same(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize("config", [BLOCKS, BANDS], ids=["blocks", "bands"])
def test_a_cached_spectrum_is_the_computed_one_and_computes_nothing(
    tmp_path, decomposed, config, dtype
):
    first = plan(two_layers(dtype=dtype), config, tmp_path)
    assert len(decomposed) == 2
    second = plan(two_layers(dtype=dtype), config, tmp_path)
    assert len(decomposed) == 2
    assert_same(first, second)
    assert_same(first, plan_spectra(two_layers(dtype=dtype), config))
    assert jax.tree.map(lambda a: a.dtype, first) == jax.tree.map(lambda a: a.dtype, second)


def test_another_base_or_number_of_bands_is_computed_anew(tmp_path, decomposed):
    plan(two_layers(), BLOCKS, tmp_path)
    changed = two_layers()
    changed["q_proj"]["kernel"] = changed["q_proj"]["kernel"].at[1, 5, 5].add(1e-3)
    got = plan(changed, BLOCKS, tmp_path)
    assert len(decomposed) == 3  # the layer that is the same is found again
    assert_same(got, plan_spectra(changed, BLOCKS))
    del decomposed[:]
    for config in (BANDS, dataclasses.replace(BANDS, num_subspaces=3)):
        plan(two_layers(), config, tmp_path)
    assert len(decomposed) == 4
    plan(two_layers(), dataclasses.replace(BLOCKS, num_subspaces=3), tmp_path)
    assert len(decomposed) == 4  # scores serve any number of blocks


@pytest.mark.parametrize(
    "harm", ["cut", "garbage", "empty", "flipped", "other fields", "other base"]
)
def test_a_damaged_entry_is_computed_again_with_a_warning(tmp_path, decomposed, harm):
    first = plan(two_layers(), BLOCKS, tmp_path)
    path = sorted(tmp_path.glob("*.npz"))[0]
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    if harm == "other fields":
        np.savez(path, scores=np.zeros(12, np.float32))
    elif harm == "other base":  # of the same shapes, put in this one's place
        plan(two_layers(seed=1), BLOCKS, tmp_path / "other")
        del decomposed[:2]
        path.write_bytes(next((tmp_path / "other").glob("*.npz")).read_bytes())
    else:
        harmed = {"cut": whole[:300], "garbage": b"\1" * 500, "empty": b"", "flipped": flipped}
        path.write_bytes(harmed[harm])
    with pytest.warns(UserWarning, match=r"of q_proj\[[01]\] in .* cannot be used .*again"):
        second = plan_spectra(two_layers(), BLOCKS, cache_dir=tmp_path)
    assert len(decomposed) == 3
    assert_same(first, second)
    assert path.read_bytes() == whole  # and mended


def test_bands_lie_where_their_kernel_lies():
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    params = two_layers()
    expected = plan_spectra(params, BANDS)
    for spec in (
        PartitionSpec(None, "fsdp", "tensor"),
        PartitionSpec("fsdp"),
        PartitionSpec(None, None, ("tensor",)),
    ):
        where = NamedSharding(mesh, spec)
        placed = {"q_proj": {"kernel": jax.device_put(params["q_proj"]["kernel"], where)}}
        got = plan_spectra(placed, BANDS)
        layers, inputs, outputs = (*spec, *(None,) * (3 - len(spec)))
        wanted = NamedSharding(mesh, PartitionSpec(layers, None, inputs, outputs))
        assert got["q_proj"].bands.sharding.is_equivalent_to(wanted, 4)
        assert_same(got, expected)
        adapted = apply_smoa(placed, BANDS, jax.random.key(0), got)
        assert adapted["q_proj"]["smoa"].bands.sharding == got["q_proj"].bands.sharding


def test_processes_plan_and_adapt_together_what_one_does_alone(tmp_path):
    program = Path(__file__).with_name("plan_in_processes.py")
    left, right = run_processes(program, [tmp_path / "cache"])
    alone = {name: outcome_of(base_params(), config) for name, config in CONFIGS.items()}
    for outcome in (left, right):
        for name, expected in alone.items():
            assert outcome[name] == expected, name
        assert outcome["whole"] == alone["blocks"]
        assert outcome["unselected"] == "passed"
        assert outcome["error"].startswith("got values that are not finite in wide[1]; expected")
    # Of 1 + 4 + 4 + 4 layers each its share, and found in the cache the second time.
    assert (left["decomposed"], right["decomposed"]) == (7, 6)
