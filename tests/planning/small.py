"""A model of which there is nothing but a ``config.json``, and runs on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from smoa_jax.cli import parse_run
from smoa_jax.training.config import RunConfig

FIELDS: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 1024,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "hidden_act": "silu",
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}


def write_model(directory: Path, **changes: Any) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({**FIELDS, **changes}))
    return directory


def run_of(model: Path, *words: str) -> RunConfig:
    """A run in float32, 16 x 96 tokens unless told otherwise."""
    given = {word.split("=")[0] for word in words}
    defaults = {
        "--model.dtype": "float32",
        "--model.compute_dtype": "float32",
        "--train.batch_size": "16",
        "--train.loss_chunk": "40",
        "--data.max_length": "96",
        "--adapter.rank": "4",
        "--train.output_dir": "none",
    }
    rest = [f"{name}={value}" for name, value in defaults.items() if name not in given]
    return parse_run([f"--model.path={model}", *rest, *words])
