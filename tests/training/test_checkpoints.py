"""Checkpoints of a run: bit-exact on any mesh, bound to their adapter, whole after any kill."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from smoa_jax import SmoaConfig, apply_smoa, combine, partition
from smoa_jax.checkpoint.errors import CheckpointError
from smoa_jax.checkpoint.native.leaves import adapter_leaves, restore_adapter
from smoa_jax.training.checkpoints import Identity, TrainingCheckpoints

ROOT = Path(__file__).parents[2]
CONFIG = SmoaConfig(rank=4, target_modules=("q_proj",))
IDENTITY = Identity(adapter_config=dataclasses.asdict(CONFIG), base_fingerprint="a base")
SMALL = {"weights": jnp.arange(8.0)}


def base_params(dtype=jnp.float32):
    kernel = jax.random.normal(jax.random.key(0), (4, 16, 24), dtype)
    return {"embed": {"embedding": jnp.ones((64, 16), dtype)}, "q_proj": {"kernel": kernel}}


def make_state(dtype=jnp.float32, config=CONFIG):
    params = apply_smoa(base_params(), config, jax.random.key(1))
    trainable, frozen = partition(params)
    trainable = jax.tree.map(lambda leaf: (leaf + 0.25).astype(dtype), trainable)
    opt_state = optax.adamw(1e-2).init(trainable)
    moments = jax.tree.map(
        lambda leaf: (
            leaf + jax.random.normal(jax.random.key(2), leaf.shape, leaf.dtype)
            if jnp.issubdtype(leaf.dtype, jnp.floating)
            else leaf + 3
        ),
        opt_state,
    )
    return {
        "trainable": trainable,
        "adapter": adapter_leaves(frozen),
        "opt_state": moments,
        "step": jnp.asarray(7, jnp.int32),
        "key": jax.random.key(5),
        "nothing": jnp.zeros((2, 0)),
    }


def place(state, mesh):
    """Over a mesh: factors are divided over layers and rows, the rest is replicated."""

    def sharding(leaf):
        if leaf.ndim == 3 and leaf.shape[1] % mesh.shape["rows"] == 0:
            return NamedSharding(mesh, PartitionSpec("layers", "rows"))
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree.map(lambda leaf: jax.device_put(leaf, sharding(leaf)), state)


def abstract(state, sharding=None):
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=sharding or leaf.sharding
        ),
        state,
    )


def make_mesh(layers, rows):
    return jax.make_mesh((layers, rows), ("layers", "rows"), axis_types=(AxisType.Auto,) * 2)


def assert_same(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for left, right in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert left.dtype == right.dtype
        if jnp.issubdtype(left.dtype, jax.dtypes.prng_key):
            left, right = jax.random.key_data(left), jax.random.key_data(right)
        np.testing.assert_array_equal(np.asarray(left), np.asarray(right), strict=True)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_state_comes_back_bit_for_bit_on_other_meshes_where_it_is_told_to_lie(tmp_path, dtype):
    state = place(make_state(dtype), make_mesh(4, 2))
    other_mesh = place(state, make_mesh(2, 4))
    one_device = abstract(state, SingleDeviceSharding(jax.devices()[3]))
    with TrainingCheckpoints(tmp_path, identity=IDENTITY) as checkpoints:
        checkpoints.save(3, state, {"epoch": 1, "rows": [1, 2]}, {"eval_loss": 0.5})
    with TrainingCheckpoints(tmp_path, identity=IDENTITY, read_only=True) as checkpoints:
        for target in (abstract(other_mesh), one_device):
            restored = checkpoints.restore(None, target)
            assert (restored.step, restored.data_position) == (3, {"epoch": 1, "rows": [1, 2]})
            assert restored.metrics == {"eval_loss": 0.5}
            assert_same(restored.state, state)
            for leaf, wanted in zip(
                jax.tree.leaves(restored.state), jax.tree.leaves(target), strict=True
            ):
                assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)
    spread = other_mesh["trainable"]["q_proj"]["smoa"].a
    assert {shard.data.shape for shard in spread.addressable_shards} == {(2, 4, 2)}


def test_arrays_may_be_donated_as_soon_as_save_returns(tmp_path):
    overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    with TrainingCheckpoints(tmp_path, identity=IDENTITY, keep_last=5) as checkpoints:
        for step in range(1, 5):
            weights = jnp.full((512, 1024), float(step))
            checkpoints.save(step, {"weights": weights}, {})
            overwrite(weights).block_until_ready()
        target = {"weights": jax.ShapeDtypeStruct((512, 1024), jnp.float32)}
        target = abstract(target, SingleDeviceSharding(jax.devices()[0]))
        for step in range(1, 5):
            weights = checkpoints.restore(step, target).state["weights"]
            np.testing.assert_array_equal(weights, np.full((512, 1024), step, np.float32))


def test_the_last_and_the_best_are_kept_and_nothing_else_is_left(tmp_path):
    losses = {1: 3.0, 2: 1.0, 3: float("nan"), 4: 2.0, 5: None, 6: 2.5, 7: 4.0}
    with TrainingCheckpoints(tmp_path, identity=IDENTITY, keep_last=2) as checkpoints:
        for step, loss in losses.items():
            checkpoints.save(step, SMALL, {}, None if loss is None else {"eval_loss": loss})
        checkpoints.wait()
        assert checkpoints.all_steps() == [2, 6, 7]
        assert (checkpoints.best_step(), checkpoints.latest_step()) == (2, 7)
    on_disk = {path.name for path in tmp_path.iterdir() if any(path.iterdir())}
    assert on_disk == {"2", "6", "7"}
    with TrainingCheckpoints(tmp_path, identity=IDENTITY, best_mode="max") as checkpoints:
        assert checkpoints.best_step() == 7
        assert checkpoints.restore(2, abstract(SMALL)).metrics == {"eval_loss": 1.0}


def test_no_step_has_the_best_metric_when_none_is_finite(tmp_path):
    with TrainingCheckpoints(tmp_path, identity=IDENTITY) as checkpoints:
        assert (checkpoints.latest_step(), checkpoints.best_step()) == (None, None)
        checkpoints.save(1, SMALL, {}, {"eval_loss": float("inf")})
        checkpoints.save(2, SMALL, {}, {"accuracy": 0.5})
        assert (checkpoints.latest_step(), checkpoints.best_step()) == (2, None)


@pytest.mark.parametrize(
    ("changes", "fingerprint", "named"),
    [
        ({"rank": 8}, "a base", ["rank=4, expected 8"]),
        ({"partition": "contiguous_blocks"}, "a base", ["partition='spectral_blocks'"]),
        ({"modulation": "none"}, "a base", ["modulation='weight', expected 'none'"]),
        (
            {"num_subspaces": 4, "dropout": 0.1},
            "another base",
            ["num_subspaces=2, expected 4", "dropout=0.0, expected 0.1", "base_fingerprint="],
        ),
    ],
)
def test_checkpoints_of_another_adapter_or_base_are_refused(tmp_path, changes, fingerprint, named):
    with TrainingCheckpoints(tmp_path, identity=IDENTITY) as checkpoints:
        checkpoints.save(1, SMALL, {})
    config = dataclasses.replace(CONFIG, **changes)
    other = Identity(adapter_config=dataclasses.asdict(config), base_fingerprint=fingerprint)
    with pytest.raises(CheckpointError) as raised:
        TrainingCheckpoints(tmp_path, identity=other)
    message = str(raised.value)
    assert all(part in message for part in named), message
    assert "\n" not in message
    assert message.count("expected") == len(named)
    with TrainingCheckpoints(tmp_path, identity=IDENTITY) as checkpoints:
        assert_same(checkpoints.restore(1, abstract(SMALL)).state, SMALL)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"weights": jnp.zeros(9)}, r"got weights as float32\[8\]; expected float32\[9\]"),
        ({"weights": jnp.zeros(8, jnp.bfloat16)}, r"expected bfloat16\[8\]"),
        ({}, "holds weights"),
        ({**SMALL, "more": jnp.zeros(1)}, "lacks more"),
    ],
)
def test_a_state_of_other_tensors_is_refused(tmp_path, target, message):
    with TrainingCheckpoints(tmp_path, identity=IDENTITY) as checkpoints:
        checkpoints.save(1, SMALL, {})
        with pytest.raises(CheckpointError, match=message):
            checkpoints.restore(1, abstract(target))


def test_bad_calls_say_what_to_do(tmp_path):
    with TrainingCheckpoints(tmp_path, identity=IDENTITY) as checkpoints:
        with pytest.raises(CheckpointError, match="no checkpoint in it"):
            checkpoints.restore(None, abstract(SMALL))
        with pytest.raises(ValueError, match="weights of type ndarray"):
            checkpoints.save(1, {"weights": np.zeros(3)}, {})
        with pytest.raises(ValueError, match="a frozen weight"):
            checkpoints.save(1, base_params(), {})
        with pytest.raises(ValueError, match="not plain JSON"):
            checkpoints.save(1, SMALL, {"row": object()})
        checkpoints.save(2, SMALL, {})
        with pytest.raises(ValueError, match="without a sharding"):
            checkpoints.restore(2, {"weights": jax.ShapeDtypeStruct((8,), jnp.float32)})
        with pytest.raises(CheckpointError, match="no checkpoint of step 1; expected one of 2"):
            checkpoints.restore(1, abstract(SMALL))
    with pytest.raises(ValueError, match="keep_last=0"):
        TrainingCheckpoints(tmp_path, identity=IDENTITY, keep_last=0)
    with pytest.raises(CheckpointError, match="what is no directory"):
        TrainingCheckpoints(tmp_path / "absent", identity=IDENTITY, read_only=True)


def test_a_step_is_saved_once_and_never_over_a_later_one(tmp_path):
    with TrainingCheckpoints(tmp_path, identity=IDENTITY) as checkpoints:
        assert checkpoints.save(1, SMALL, {})
        assert checkpoints.save(2, SMALL, {})
        assert not checkpoints.save(2, SMALL, {}, wait=True)
    with TrainingCheckpoints(tmp_path, identity=IDENTITY) as checkpoints:
        with pytest.raises(CheckpointError, match="got step 2 to save after step 2"):
            checkpoints.save(2, SMALL, {})
        checkpoints.restore(2, abstract(SMALL))
        assert not checkpoints.save(2, SMALL, {})
        assert checkpoints.save(3, SMALL, {})
    with (
        TrainingCheckpoints(tmp_path, identity=IDENTITY, read_only=True) as checkpoints,
        pytest.raises(CheckpointError, match="read-only"),
    ):
        checkpoints.save(4, SMALL, {})


def damage_arrays(step: Path) -> None:
    for path in (step / "state").rglob("*"):
        if path.is_file() and path.parent.name == "d":
            path.write_bytes(path.read_bytes()[:-7])


def damage_record(step: Path) -> None:
    path = step / "record" / "metadata"
    path.write_text(path.read_text()[:-9])


@pytest.mark.parametrize("damage", [damage_arrays, damage_record])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_it(tmp_path, damage):
    with TrainingCheckpoints(tmp_path, identity=IDENTITY) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, SMALL, {"row": step})
    damage(tmp_path / "2")
    with TrainingCheckpoints(tmp_path, identity=IDENTITY, read_only=True) as checkpoints:
        with pytest.raises(CheckpointError, match=r"2: can't be read .*remove that directory"):
            checkpoints.restore(2, abstract(SMALL))
        assert checkpoints.restore(None, abstract(SMALL)).step == 1
        assert (tmp_path / "2").exists()
    with TrainingCheckpoints(tmp_path, identity=IDENTITY) as checkpoints:
        restored = checkpoints.restore(None, abstract(SMALL))
        assert (restored.step, restored.data_position) == (1, {"row": 1})
        (note,) = checkpoints.notes
        assert note.startswith("passed over step 2 for step 1:")
        assert "can't be read" in note
        # Its step is taken again, and it is kept for whoever wants to look at it.
        checkpoints.save(2, SMALL, {"row": 20}, wait=True)
        assert checkpoints.all_steps() == [1, 2]
    assert (tmp_path / "damaged-2" / "state").is_dir()
    with TrainingCheckpoints(tmp_path, identity=IDENTITY, read_only=True) as checkpoints:
        assert checkpoints.restore(None, abstract(SMALL)).data_position == {"row": 20}


def test_where_no_checkpoint_can_be_read_it_is_refused(tmp_path):
    with TrainingCheckpoints(tmp_path, identity=IDENTITY) as checkpoints:
        checkpoints.save(1, SMALL, {})
    damage_arrays(tmp_path / "1")
    with (
        TrainingCheckpoints(tmp_path, identity=IDENTITY) as checkpoints,
        pytest.raises(CheckpointError, match=r"1: can't be read"),
    ):
        checkpoints.restore(None, abstract(SMALL))
    assert (tmp_path / "1").is_dir()


@pytest.mark.parametrize("partition_kind", ["spectral_blocks", "spectral_bands"])
def test_a_checkpoint_holds_the_adapter_and_no_base_weights(tmp_path, partition_kind):
    config = SmoaConfig(rank=4, partition=partition_kind, target_modules=("q_proj",))
    key = jax.random.key(3)
    base = {
        "embed": {"embedding": jax.random.normal(key, (512, 256))},
        "q_proj": {"kernel": jax.random.normal(key, (2, 256, 256))},
    }
    params = apply_smoa(base, config, key)
    trainable, frozen = partition(params)
    # Random values throughout: the storage format compresses zeros away.
    trainable, *moments = (
        jax.tree.map(lambda leaf, n=n: jax.random.normal(jax.random.key(n), leaf.shape), trainable)
        for n in range(3)
    )
    state = {"trainable": trainable, "adapter": adapter_leaves(frozen), "moments": moments}
    with TrainingCheckpoints(tmp_path, identity=IDENTITY) as checkpoints:
        checkpoints.save(1, state, {})
        checkpoints.wait()
        files = [path for path in (tmp_path / "1").rglob("*") if path.is_file()]
        content = b"".join(path.read_bytes() for path in files)
        restored = checkpoints.restore(1, abstract(state)).state
    for name in (b"/kernel", b"/embedding", b"/bands"):
        assert name not in content
    assert b"trainable/q_proj/smoa/a" in content
    # Factors and two moments, compressed a little, some small vectors and the format's own files;
    # one layer's kernel, 256 KiB, would not fit in beside them.
    factors = sum(leaf.nbytes for leaf in jax.tree.leaves(trainable))
    assert 2.5 * factors < len(content) < 3 * factors + 50_000 < 4 * 256 * 256
    leaves = {**adapter_leaves(restored["trainable"]), **restored["adapter"]}
    assert_same(restore_adapter(base, config, leaves), combine(trainable, frozen))


def test_a_run_killed_at_any_moment_of_saving_resumes_from_a_whole_checkpoint(tmp_path):
    from tests.training.kill_during_save import IDENTITY as KILLED_IDENTITY
    from tests.training.kill_during_save import NUM_STEPS, state_of

    count = 12
    program = Path(__file__).with_name("kill_during_save.py")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    command = [sys.executable, "-W", "ignore", str(program), str(tmp_path), str(count)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    killed = [f"{number} {-signal.SIGKILL}" for number in range(count)]
    assert done.stdout.splitlines() == killed

    half_written, resumed = 0, set()
    for number in range(count):
        run = tmp_path / str(number)
        finished = int((run / "finished").read_text()) if (run / "finished").exists() else 0
        names = [path.name for path in (run / "checkpoints").glob("*")]
        half_written += any("tmp" in name for name in names)
        with TrainingCheckpoints(
            run / "checkpoints", identity=KILLED_IDENTITY, keep_last=2
        ) as checkpoints:
            latest = checkpoints.latest_step() or 0
            assert finished <= latest <= NUM_STEPS
            resumed.add(latest)
            for step in checkpoints.all_steps():
                restored = checkpoints.restore(step, abstract(state_of(step)))
                assert restored.data_position == {"row": 10 * step}
                assert_same(restored.state, state_of(step))
            checkpoints.save(latest + 1, state_of(latest + 1), {}, wait=True)
            assert checkpoints.latest_step() == latest + 1
            left = {path.name for path in (run / "checkpoints").iterdir() if any(path.iterdir())}
            assert left == {str(step) for step in checkpoints.all_steps()}
    assert half_written >= 3
    assert len(resumed) >= 3
