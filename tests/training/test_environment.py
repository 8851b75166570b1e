"""What a run says of the machine that it runs on."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import subprocess

import jax
import pytest

from smoa_jax.models.decoder import Decoder
from smoa_jax.models.fused_attention import AttentionSharding, CudnnAttention, SplashAttention
from smoa_jax.sharding.mesh import MeshConfig, make_mesh
from smoa_jax.training.environment import (
    attention_name,
    commit,
    device_kinds,
    unused_accelerator,
    versions,
)
from tests.training.tiny_run import DECODER


def test_versions_and_devices_are_those_that_run():
    assert versions()["jax"] == jax.__version__
    assert versions()["smoa-jax"] == importlib.metadata.version("smoa-jax")
    (count,) = device_kinds(make_mesh(MeshConfig(data=4), jax.devices()[:4])).values()
    assert count == 4


def test_the_commit_is_that_of_the_checkout_and_says_if_files_differ(tmp_path):
    def git(*words):
        who = ["-c", "user.name=n", "-c", "user.email=e@x"]
        command = ["git", "-C", str(tmp_path), *who, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert commit(tmp_path) == ""
    git("init", "-q")
    file = tmp_path / "package" / "a.py"
    file.parent.mkdir()
    file.write_text("1")
    assert commit(tmp_path) == ""  # an environment in a checkout is none of its files
    git("add", ".")
    git("commit", "-qm", "why")
    assert commit(file.parent) == git("rev-parse", "HEAD")
    file.write_text("2")
    assert commit(file.parent) == git("rev-parse", "HEAD") + "+"


def test_attention_goes_by_the_name_that_a_configuration_gives_it():
    decoder = Decoder(config=DECODER)
    sharding = AttentionSharding(
        mesh=make_mesh(MeshConfig(data=8, fsdp=1)), batch=("data",), heads=("tensor",)
    )
    names = []
    for fused in (None, SplashAttention(sharding=sharding), CudnnAttention(sharding=sharding)):
        names.append(attention_name(dataclasses.replace(decoder, fused=fused)))
    assert names == ["xla", "splash", "cudnn"]


@pytest.mark.parametrize(
    ("devices", "words"),
    [
        ([], []),
        (["null", "vfio/vfio"], []),
        (["nvidiactl"], ["an NVIDIA GPU", "'.[train,cuda13]' in the repo", "cuda12"]),
        (["accel0"], ["a TPU", "'.[train,tpu]'"]),
        (["vfio/0"], ["a TPU", "'.[train,tpu]'"]),
    ],
)
def test_an_accelerator_that_is_not_used_is_told_with_the_remedy(
    tmp_path, monkeypatch, devices, words
):
    for name in devices:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert unused_accelerator(tmp_path) == ""  # JAX_PLATFORMS=cpu: it was asked for
    monkeypatch.delenv("JAX_PLATFORMS")
    said = unused_accelerator(tmp_path)
    assert bool(said) == bool(words)
    assert all(word in said for word in words)
