"""Any adapter of a run can be had: as it stands, at its best step, at its last, at any kept."""

from __future__ import annotations

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from smoa_jax.checkpoint.errors import CheckpointError
from smoa_jax.checkpoint.native.directory import read_adapter
from smoa_jax.training import run as training_run
from smoa_jax.training import saved_adapter
from smoa_jax.training.run import run
from smoa_jax.training.saved_adapter import adapter_directory
from tests.training.conftest import use_one_device
from tests.training.tiny_run import run_config


@pytest.fixture(scope="module")
def finished(base_dir, tmp_path_factory):
    """A bands run of 9 steps that is best after its fourth and second best after its sixth."""
    output = tmp_path_factory.mktemp("saved") / "run"
    seen = {}

    def on_step(taken):
        node = taken.state["trainable"]["layers"]["self_attn"]["q_proj"]["smoa"]
        seen[taken.step] = np.asarray(node.a)
        return True

    losses = iter([9.0, 3.0, 1.0, 1.5, 2.0, 2.5])  # before, and after steps 2, 4, 6, 8 and 9
    with pytest.MonkeyPatch.context() as patch:
        use_one_device(patch)
        patch.setattr(training_run, "mean_loss", lambda *_: next(losses))
        config = run_config(
            base_dir,
            output,
            train_steps=9,
            train_save_every=2,
            train_eval_every=2,
            train_keep_last=1,
            train_keep_best=2,
            adapter_partition="spectral_bands",
            adapter_target_modules=["q_proj", "down_proj"],
        )
        run(config, on_step=on_step)
    return output, seen


KEPT = (4, 6, 9)


def factors(directory):
    return load_file(directory / "adapter.safetensors")["layers/self_attn/q_proj/a"]


def test_the_best_and_the_last_and_a_numbered_checkpoint_are_what_the_run_held_then(
    base_dir, finished
):
    output, seen = finished
    steps = (output / "checkpoints").iterdir()
    assert sorted(int(path.name) for path in steps if path.name.isdigit()) == list(KEPT)
    wanted = {"best": 4, "last": 9} | {str(step): step for step in KEPT}
    for checkpoint, step in wanted.items():
        with adapter_directory(output, checkpoint, str(base_dir)) as directory:
            np.testing.assert_array_equal(factors(directory), seen[step])
    assert not directory.exists()


def test_the_last_checkpoint_holds_the_adapter_of_the_finished_run(base_dir, finished):
    output, _ = finished
    names = ("adapter.safetensors", "adapter.json")
    expected = [(output / "adapter" / name).read_bytes() for name in names]
    for named in (output, output / "adapter"):
        with adapter_directory(named, "last", str(base_dir)) as directory:
            assert [(directory / name).read_bytes() for name in names] == expected
        with adapter_directory(named, "", str(base_dir)) as directory:
            assert directory == output / "adapter"


def test_an_adapter_of_a_checkpoint_says_how_it_was_trained_until_then(base_dir, finished):
    output, _ = finished
    said = {}
    for checkpoint in ("best", "last"):
        with adapter_directory(output, checkpoint, str(base_dir)) as directory:
            said[checkpoint] = read_adapter(directory).facts
            assert (
                f"| steps | {said[checkpoint]['steps']} |" in (directory / "README.md").read_text()
            )
    known = read_adapter(output / "adapter").facts
    assert known["held-out loss"] == "2.5000 (the base alone: 9.0000)"
    assert said["last"] == known
    own = {"steps": 4, "held-out loss": "1.0000 (the base alone: 9.0000)"}
    assert said["best"] == known | own
    assert {"data", "rows of a step", "learning rate", "seed"} < set(known)


def test_what_is_not_there_is_refused(base_dir, finished, tmp_path):
    output, _ = finished
    with (
        pytest.raises(CheckpointError, match="no checkpoint of step 8; expected one of"),
        adapter_directory(output, "8", str(base_dir)),
    ):
        pass
    with (
        pytest.raises(ValueError, match="expected best, last or a step's number"),
        adapter_directory(output, "first", str(base_dir)),
    ):
        pass
    with (
        pytest.raises(CheckpointError, match="for what is no run"),
        adapter_directory(tmp_path, "best", str(base_dir)),
    ):
        pass
    with adapter_directory(tmp_path, "", str(base_dir)) as directory:
        assert directory == tmp_path  # and whoever reads it says that it holds no adapter


def test_an_interrupted_run_gives_its_last_checkpoint_and_no_adapter(
    base_dir, tmp_path, one_device
):
    output = tmp_path / "run"
    run(run_config(base_dir, output), on_step=lambda taken: taken.step < 3)
    with (
        pytest.raises(CheckpointError, match="a run that isn't finished"),
        adapter_directory(output, "", str(base_dir)),
    ):
        pass
    with (
        pytest.raises(CheckpointError, match="none with a held-out loss"),
        adapter_directory(output, "best", str(base_dir)),
    ):
        pass
    with adapter_directory(output, "last", str(base_dir)) as directory:
        description = read_adapter(directory)
    assert (description.template, description.base_name) == ("plain", str(base_dir))
    assert yaml.safe_load((output / "config.yaml").read_text())["train"]["steps"] == 4


def test_a_name_of_the_hub_is_fetched_and_a_mistyped_path_is_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    asked = []

    def fetch(name, *, weights):
        asked.append((name, weights))
        return tmp_path / "fetched"

    monkeypatch.setattr(saved_adapter, "download", fetch)
    assert saved_adapter.locate("me/mine") == tmp_path / "fetched"
    assert asked == [("me/mine", True)]
    for path in ("runs/nope", "nowhere"):
        with pytest.raises(CheckpointError, match=f"{path}: got a path that does not exist"):
            saved_adapter.locate(path)
    assert len(asked) == 1
