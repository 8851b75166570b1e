"""A Hugging Face directory, here or on the hub: its configs and where its weights lie."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from smoa_jax.checkpoint.errors import CheckpointError, require
from smoa_jax.checkpoint.huggingface.config import read_json

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"

CONFIG_PATTERNS = ("*.json", "*.jinja", "tokenizer.model")
WEIGHT_PATTERNS = (*CONFIG_PATTERNS, "*.safetensors")

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def read_configs(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What ``config.json`` and ``generation_config.json`` hold ({} where the latter is absent)."""
    config_path = directory / CONFIG_FILE
    require(
        config_path.is_file(),
        f"a directory without {CONFIG_FILE}",
        "a Hugging Face model's directory or the path of a GGUF file",
        where=directory,
    )
    generation_path = directory / GENERATION_FILE
    generation = read_json(generation_path) if generation_path.is_file() else {}
    return read_json(config_path), generation


def is_hub_name(name: str) -> bool:
    """Whether ``name`` could be ``organisation/model`` on the hub."""
    return _HUB_NAME.fullmatch(name) is not None


def first_line(error: Exception) -> str:
    """What an error says first; its kind, if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def download(name: str, *, weights: bool) -> Path:
    """The directory of a hub model's files, downloaded unless they are in the hub's cache.

    Only safetensors, JSON and tokenizer files are fetched, never a pickle.

    Args:
        name: ``organisation/model``.
        weights: False leaves the weights out.
    """
    # Imported here: reading what lies on disk needs no network client.
    from huggingface_hub import errors, snapshot_download

    here = f"{name!r} is not a path here"
    try:
        return Path(
            snapshot_download(
                name,
                allow_patterns=list(WEIGHT_PATTERNS if weights else CONFIG_PATTERNS),
                ignore_patterns=["*/*"],  # copies in other formats
            )
        )
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{here}, and on the hub it is gated; expected an account that was granted access: "
            f"accept its terms on https://huggingface.co/{name}, then run `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{here}, and the hub has no such public model; check the spelling, "
            "or run `hf auth login` if it is private"
        ) from error
    except Exception as error:  # HTTP, proxy, disk and storage layers each raise their own
        raise CheckpointError(
            f"{here}, and it can't be downloaded ({first_line(error)}); expected a directory, a "
            "GGUF file or a connection to the hub: download it elsewhere and give its path"
        ) from error
