"""Ways to spoil a model's directory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import numpy as np
from safetensors.numpy import load_file, save_file

Damage: TypeAlias = Callable[[Path], object]

#: A tensor of the tiny base.
UP = "model.layers.1.mlp.up_proj.weight"
WEIGHTS = "model.safetensors"


def truncate(model: Path) -> None:
    file = model / WEIGHTS
    file.write_bytes(file.read_bytes()[:-1000])


def corrupt(model: Path) -> None:
    file = model / WEIGHTS
    stored = bytearray(file.read_bytes())
    stored[20:40] = b"\xff" * 20
    file.write_bytes(stored)


def pickle(model: Path) -> None:
    (model / WEIGHTS).rename(model / "pytorch_model.bin")


def with_tensors(change: Callable[[dict[str, np.ndarray]], object]) -> Damage:
    """Rewrites the weights after ``change``."""

    def damage(model: Path) -> None:
        tensors = load_file(model / WEIGHTS)
        change(tensors)
        save_file(tensors, model / WEIGHTS)

    return damage


def with_config(**fields: object) -> Damage:
    """Sets fields of ``config.json``."""

    def damage(model: Path) -> None:
        path = model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return damage


def shorten_vocabulary(tensors: dict[str, np.ndarray]) -> None:
    """Leaves embeddings for 40 tokens, fewer than the tokenizer writes."""
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:40].copy()


def make_another_base(model: Path) -> None:
    """The same shapes, other weights."""
    with_tensors(lambda tensors: tensors.update({UP: tensors[UP] + 1}))(model)
