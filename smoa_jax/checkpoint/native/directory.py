"""An adapter as a directory of its own: small, complete, and bound to one base.

    adapter.safetensors   layers/self_attn/q_proj/a, .../b, .../in_block, ...  as in the tree
    adapter.json          format version, adapter config, base fingerprint and name, prompt
                          template, counts, SHA-256 of the other file, facts of its training
    README.md             for people; nothing reads it

Tensors are stored as the tree holds them, padding included, so that they come back bit for bit.
Block ids are whole numbers in the file. Spectral bands are not stored but recomputed from the base
and checked (``adapter_leaves``). Loading refuses another base, a damaged file, and tensors that
are not those of the config.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from smoa_jax import checks
from smoa_jax.adapter.config import SmoaConfig
from smoa_jax.adapter.planning.spectra import Progress
from smoa_jax.adapter.tree import count_trainable, strip_smoa
from smoa_jax.adapter.types import Params
from smoa_jax.checkpoint.card import CARD_FILE, model_card
from smoa_jax.checkpoint.directories import put_back, replaced_directory
from smoa_jax.checkpoint.errors import CheckpointError, as_checkpoint_error, refuse, require
from smoa_jax.checkpoint.native.leaves import (
    adapter_leaves,
    attach_leaves,
    check_leaves,
    restore_adapter,
)
from smoa_jax.storage import located

TENSORS_FILE = "adapter.safetensors"
ADAPTER_FILE = "adapter.json"
FORMAT_VERSION = 1

_BLOCK_IDS = ("in_block", "out_block")
_FIELDS = {
    "format_version": int,
    "config": dict,
    "base_fingerprint": str,
    "base_name": str,
    "num_trained": int,
    "num_base": int,
    "sha256": str,
}
_OPTIONAL = {"template": "", "facts": {}}


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterDescription:
    """What ``adapter.json`` says."""

    config: SmoaConfig
    base_fingerprint: str
    base_name: str
    num_trained: int
    num_base: int
    sha256: str  # of the tensors' file
    template: str = ""  # that prompts were put into for training; empty: not said
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of its training, by name

    @property
    def said(self) -> dict[str, Any]:
        """What a README says of it beside its settings."""
        return {"trained parameters": f"{self.num_trained:,}", **self.facts}


def save_adapter(
    params: Params,
    config: SmoaConfig,
    directory: str | Path,
    *,
    base_fingerprint: str,
    base_name: str,
    template: str = "",
    facts: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write an adapter, without its base.

    >>> save_adapter(params, config, "my-adapter", base_fingerprint=base.fingerprint,
    ...              base_name="SmolLM2-135M-Instruct")

    Args:
        params: The adapted tree, whole; on one process's devices.
        config: The one that it was made with.
        directory: To be made; holds all of the adapter or nothing, whenever the process dies.
        base_fingerprint: Of the base model: ``BaseModel.fingerprint``, or ``tree_fingerprint`` of
            ``smoa_jax.adapter.fingerprint`` for a base that came from no file.
        base_name: For people; not checked.
        template: Name of the prompt template of its training, for who generates with it.
        facts: For its README and those of its exports, by name, plain JSON: data, settings, losses.
        overwrite: Replace an adapter; any other occupied directory is refused still.

    Returns:
        The directory.

    Raises:
        CheckpointError: if the directory is occupied.
        ValueError: if ``params`` holds no adapter, or another than ``config`` makes.
    """
    leaves = adapter_leaves(params)
    checks.require(bool(leaves), "params without any adapter", "a tree from apply_smoa")
    base = strip_smoa(params)
    check_leaves(base, config, leaves)
    content = save({name: _to_file(name, leaf) for name, leaf in leaves.items()})
    description = {
        "format_version": FORMAT_VERSION,
        "config": config.to_fields(),
        "base_fingerprint": base_fingerprint,
        "base_name": base_name,
        "template": template,
        "num_trained": count_trainable(base, config),
        "num_base": sum(leaf.size for leaf in jax.tree.leaves(base)),
        "sha256": hashlib.sha256(content).hexdigest(),
        **({"facts": dict(facts)} if facts else {}),
    }
    target = located(directory)
    with replaced_directory(
        target, marker=ADAPTER_FILE, what="an adapter", overwrite=overwrite
    ) as draft:
        (draft / TENSORS_FILE).write_bytes(content)
        text = json.dumps(description, indent=2, ensure_ascii=False) + "\n"
        (draft / ADAPTER_FILE).write_text(text, encoding="utf-8")
        said = read_adapter(draft).said
        card = model_card("adapter", config, base_name=base_name, facts=said)
        (draft / CARD_FILE).write_text(card, encoding="utf-8")
    return target


def load_adapter(
    directory: str | Path,
    base_params: Params,
    *,
    base_fingerprint: str,
    force: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Params:
    """Put a saved adapter onto its base.

    >>> params = load_adapter("my-adapter", base.params, base_fingerprint=base.fingerprint)

    Block ids come from the file. The adapter's tensors come to lie as their kernels do.

    Args:
        directory: As ``save_adapter`` wrote it.
        base_params: Of the base model.
        base_fingerprint: Of the base model; another one than the adapter's is refused.
        force: Load onto another base all the same, if the shapes fit.
        cache_dir: For spectral bands, as ``plan_spectra`` takes it; they are computed again.
        progress: Likewise.

    Returns:
        The adapted tree.

    Raises:
        CheckpointError: for another base, or for a directory that is damaged or incomplete.
    """
    source = located(directory)
    description, tensors = _read(source, base_fingerprint, force=force)
    leaves = {name: jnp.asarray(value) for name, value in tensors.items()}
    with as_checkpoint_error(source):
        return restore_adapter(
            base_params, description.config, leaves, cache_dir=cache_dir, progress=progress
        )


def open_adapter(
    directory: str | Path, base_params: Params, *, base_fingerprint: str
) -> tuple[Params, SmoaConfig]:
    """A saved adapter on the host beside an abstract base, and its configuration.

    For what needs no weights, or reads them by itself: the bands of a spectrum stay abstract.

    >>> params, config = open_adapter("my-adapter", base.params, base_fingerprint=base.fingerprint)

    Args:
        directory: As ``save_adapter`` wrote it.
        base_params: Of the base model, abstract.
        base_fingerprint: Of the base model; another one than the adapter's is refused.

    Raises:
        CheckpointError: as ``load_adapter``.
    """
    source = located(directory)
    description, leaves = _read(source, base_fingerprint, force=False)
    with as_checkpoint_error(source):
        return attach_leaves(base_params, description.config, leaves), description.config


def _read(
    source: Path, base_fingerprint: str, *, force: bool
) -> tuple[AdapterDescription, dict[str, np.ndarray]]:
    """What an adapter says of itself, and its tensors as the tree holds them."""
    description = read_adapter(source)
    require(
        force or description.base_fingerprint == base_fingerprint,
        f"a base with fingerprint {base_fingerprint[:16]} for an adapter of "
        f"{description.base_name}",
        f"the base that it was trained on, {description.base_fingerprint[:16]}",
        "name that one (load_adapter takes force=True to load it onto another all the same)",
        where=source,
    )
    tensors = _read_tensors(source / TENSORS_FILE, description.sha256)
    return description, {name: _from_file(name, value) for name, value in tensors.items()}


def read_adapter(directory: str | Path) -> AdapterDescription:
    """What a saved adapter says of itself; reads no tensors.

    Raises:
        CheckpointError: if the directory is none of ours, or its format is another.
    """
    source = located(directory)
    put_back(source)
    path = source / ADAPTER_FILE
    require(
        path.is_file(),
        f"a directory without {ADAPTER_FILE}",
        "an adapter's, such as the adapter/ in a run's output_dir",
        where=path.parent,
    )
    try:
        fields = _OPTIONAL | json.loads(path.read_text(encoding="utf-8"))
        require(
            fields["format_version"] == FORMAT_VERSION,
            f"adapter format {fields['format_version']}",
            f"{FORMAT_VERSION}",
            "read it with the version of smoa_jax that wrote it",
            where=path,
        )
        known = _FIELDS | {name: type(value) for name, value in _OPTIONAL.items()}
        wrong = [name for name, kind in known.items() if not isinstance(fields[name], kind)]
        if wrong or set(fields) != set(known):
            raise ValueError(f"wrong fields {sorted(set(wrong) | set(fields) ^ set(known))}")
        del fields["format_version"]
        return AdapterDescription(**{**fields, "config": SmoaConfig(**fields["config"])})
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        refuse(
            f"what isn't the description of an adapter ({error})",
            "JSON as save_adapter writes it",
            "copy it again",
            where=path,
        )


def _read_tensors(path: Path, sha256: str) -> dict[str, np.ndarray]:
    try:
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != sha256:
            raise ValueError(f"its SHA-256 is not the one in {ADAPTER_FILE}")
        return _tensors(content)
    except (OSError, ValueError, SafetensorError) as error:
        refuse(
            f"a file that is damaged or incomplete ({error})",
            "the one that save_adapter wrote",
            "copy it again",
            where=path,
        )


def _to_file(name: str, leaf: Any) -> np.ndarray:
    checks.require(
        not isinstance(leaf, jax.Array) or leaf.is_fully_addressable,
        f"{name}, which is spread over several processes",
        "all of it on this process's devices",
        "save from a single process",
    )
    array = np.ascontiguousarray(np.asarray(leaf)).reshape(leaf.shape)
    return array.astype(np.uint16) if name.rsplit("/", 1)[-1] in _BLOCK_IDS else array


def _from_file(name: str, array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) if name.rsplit("/", 1)[-1] in _BLOCK_IDS else array


def _tensors(content: bytes) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file, bfloat16 too, which its NumPy reader does not know.

    Raises:
        CheckpointError: for a dtype that no adapter is saved in.
    """
    names = {"F16": "f2", "F32": "f4", "U8": "u1", "U16": "u2", "U32": "u4", "I32": "i4"}
    dtypes = {name: np.dtype(code) for name, code in names.items()}
    dtypes["BF16"] = np.dtype(jnp.bfloat16)
    tensors = {}
    for name, entry in deserialize(content):
        require(
            entry["dtype"] in dtypes,
            f"{name} of dtype {entry['dtype']}",
            f"one of {', '.join(dtypes)}",
            "use a file that smoa_jax has written",
        )
        flat = np.frombuffer(bytes(entry["data"]), dtypes[entry["dtype"]])
        tensors[name] = flat.reshape(entry["shape"])
    return tensors
