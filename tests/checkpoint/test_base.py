"""Finding a base model by its path or name, and doing so without torch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import huggingface_hub
import jax.numpy as jnp
import pytest
from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects

from smoa_jax.checkpoint.base import BaseModel, abstract_base, load_base
from smoa_jax.checkpoint.errors import CheckpointError
from smoa_jax.checkpoint.huggingface.directory import download
from tests.checkpoint.hf_files import CONFIG, llama_tensors, write_directory, write_gguf


def test_a_directory_with_one_gguf_file_is_that_file(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", CONFIG, llama_tensors(CONFIG))
    assert load_base(tmp_path).source == path
    write_gguf(tmp_path / "n.gguf", CONFIG, llama_tensors(CONFIG))
    with pytest.raises(CheckpointError, match=r"2 GGUF files \(m.gguf, n.gguf\); expected one"):
        load_base(tmp_path)


def test_a_home_directory_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_directory(tmp_path / "m", CONFIG, llama_tensors(CONFIG))
    assert load_base("~/m").source == tmp_path / "m"


@pytest.mark.parametrize("load", [load_base, abstract_base])
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.int8])
def test_other_dtypes_are_refused(tmp_path, load, dtype):
    with pytest.raises(ValueError, match=r"expected one of float32, bfloat16"):
        load(tmp_path, dtype)


def test_a_path_that_does_not_exist_says_what_was_expected(tmp_path):
    with pytest.raises(CheckpointError, match=r"no such file or directory; expected a Hugging"):
        load_base(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"no such file or directory"):
        load_base("models/absent.gguf")


def test_a_name_is_downloaded_without_pickles_and_loaded(tmp_path, monkeypatch):
    directory = write_directory(tmp_path / "snapshot", CONFIG, llama_tensors(CONFIG))
    asked = []

    def snapshot_download(name, *, allow_patterns, ignore_patterns):
        asked.append((name, allow_patterns))
        return str(directory)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert isinstance(load_base("some-org/Model-1.5B"), BaseModel)
    assert abstract_base("some-org/Model-1.5B").config.embed_dim == 32
    (first, with_weights), (_, without) = asked
    assert first == "some-org/Model-1.5B"
    assert set(with_weights) - set(without) == {"*.safetensors"}
    assert not any("bin" in pattern or "pt" in pattern for pattern in with_weights)


FILES = {
    "llama": {
        "model-00001-of-00002.safetensors": True,
        "model-00002-of-00002.safetensors": True,
        "model.safetensors.index.json": True,
        "original/consolidated.00.pth": False,
        "original/params.json": False,
        "original/tokenizer.model": False,
        "onnx/model.onnx": False,
        "pytorch_model-00001-of-00002.bin": False,
        "USE_POLICY.md": False,
    },
    "gemma": {
        "model.safetensors": True,
        "chat_template.jinja": True,
        "tokenizer.model": True,
        "gemma-2b.gguf": False,
        "examples/notebook.ipynb": False,
        "examples/weights.safetensors": False,
        "training_args.bin": False,
        "flax_model.msgpack": False,
    },
}
COMMON = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


@pytest.mark.parametrize("family", FILES)
def test_of_a_hub_model_only_what_is_read_is_fetched(family, tmp_path, monkeypatch):
    asked = {}

    def snapshot_download(name, **patterns):
        asked.update(patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    listed = {**FILES[family], **dict.fromkeys(COMMON, True)}
    download("some-org/model", weights=True)
    fetched = set(filter_repo_objects(listed, **asked))
    assert fetched == {name for name, wanted in listed.items() if wanted}
    download("some-org/model", weights=False)
    weights = {name for name in fetched if name.endswith(".safetensors")}
    assert set(filter_repo_objects(listed, **asked)) == fetched - weights


def test_without_a_connection_a_name_says_so_and_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"outgoing traffic has been disabled.*give its path"):
        load_base("some-org/model")


class Answer:
    """What a hub error wants to know of the server's answer."""

    headers: Mapping[str, str] = MappingProxyType({})
    status_code = 403
    request = None
    text = ""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.GatedRepoError("no", response=Answer()), "gated; expected an account"),  # type: ignore[arg-type]
        (errors.RepositoryNotFoundError("no", response=Answer()), "check the spelling"),  # type: ignore[arg-type]
        (errors.LocalEntryNotFoundError("offline\nmore"), r"\(offline\).* give its path"),
        (OSError("no route"), r"can't be downloaded \(no route\)"),
        (errors.XetDownloadError("torn"), r"can't be downloaded \(torn\)"),
    ],
)
def test_a_name_that_cannot_be_downloaded_says_what_to_do(monkeypatch, error, message):
    def snapshot_download(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_base("some-org/model")
    assert "\n" not in str(caught.value)


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
from pathlib import Path
import numpy as np
from smoa_jax.checkpoint.base import load_base
from smoa_jax.checkpoint.export.huggingface import export_huggingface
first, second = (load_base(path) for path in sys.argv[1:3])
np.testing.assert_array_equal(first.params["norm"]["scale"], second.params["norm"]["scale"])
export_huggingface(first.params, first.config, sys.argv[3], dtype="bfloat16")
assert load_base(sys.argv[3]).config == first.config
print("done without torch")
"""


def test_loading_and_exporting_need_no_torch(tmp_path):
    tensors = llama_tensors(CONFIG)
    directory = write_directory(tmp_path / "m", CONFIG, tensors)
    gguf_file = write_gguf(tmp_path / "m.gguf", CONFIG, tensors)
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, directory, gguf_file, tmp_path / "out"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        timeout=300,
    )
    assert run.stdout.strip() == "done without torch", run.stderr
