"""A tiny Llama on disk, with a tokenizer, and runs on it that take seconds.

The directory is what a user would have: safetensors, config and tokenizer, written by the
project's own export. Nothing in it was trained; what matters is that every byte goes the real way.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from smoa_jax.adapter.config import SmoaConfig
from smoa_jax.checkpoint.export.huggingface import export_huggingface
from smoa_jax.data.arithmetic import ArithmeticTask, arithmetic_row
from smoa_jax.data.config import DataConfig, TaskConfig
from smoa_jax.models.config import DecoderConfig
from smoa_jax.models.params import init_params
from smoa_jax.sharding.mesh import MeshConfig
from smoa_jax.sharding.processes import DistributedConfig
from smoa_jax.storage import located
from smoa_jax.training.config import (
    GenerationEvalConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)

#: All sizes differ and divide by the mesh axes that the tests use.
DECODER = DecoderConfig(
    vocab_size=288,
    embed_dim=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    mlp_dim=48,
    rope_base=10000.0,
    norm_epsilon=1e-5,
    tie_embeddings=False,
    max_positions=64,
)
TASK = TaskConfig(name="parity", digits=1, terms=3, train_rows=64, eval_rows=16)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of ``DECODER.vocab_size`` tokens, trained on questions of the task."""
    task = ArithmeticTask(name=TASK.name, digits=TASK.digits, terms=TASK.terms)
    rows: list[Any] = [arithmetic_row(task, seed=99, index=index) for index in range(50)]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=DECODER.vocab_size,
        special_tokens=["<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [f"{row.instruction} {row.output} Instruction Response" for row in rows]
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")


def write_base(directory: Path, **changes: Any) -> Path:
    """The base in ``directory``, made unless it is there already."""
    if not directory.exists():
        decoder = dataclasses.replace(DECODER, **changes)
        export_huggingface(
            init_params(decoder, jax.random.key(7)),
            decoder,
            directory,
            dtype=jnp.float32,
            tokenizer=make_tokenizer(),
        )
    return directory


def run_config(base: Path, output: Path, **changes: Any) -> RunConfig:
    """A run of a few steps; ``changes`` replace fields, ``train_steps=3`` those of a section."""
    sections: dict[str, dict[str, Any]] = {
        "model": {"path": str(base)},
        "train": {
            "output_dir": str(output),
            "steps": 4,
            "batch_size": 8,
            "loss_chunk": 10,
        },
        "data": {"max_length": 24, "source": "arithmetic", "template": "plain", "task": TASK},
        "adapter": {"rank": 4, "num_subspaces": 2},
        "optimizer": {"learning_rate": 3e-2, "warmup_steps": 2},
        "mesh": {},
        "distributed": {},
        "evaluation": {},
    }
    for name, value in changes.items():
        section, field = name.split("_", 1)
        sections[section][field] = value
    return RunConfig(
        model=ModelConfig(**sections["model"]),
        train=TrainConfig(**sections["train"]),
        data=DataConfig(**sections["data"]),
        adapter=SmoaConfig(**sections["adapter"]),
        optimizer=OptimizerConfig(**sections["optimizer"]),
        mesh=MeshConfig(**sections["mesh"]),
        distributed=DistributedConfig(**sections["distributed"]),
        evaluation=GenerationEvalConfig(**sections["evaluation"]),
    )


def read_metrics(directory: Path, event: str = "") -> list[dict[str, Any]]:
    """The records of ``metrics.jsonl``, of one kind if asked for."""
    lines = (located(directory) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return [record for record in records if event in ("", record["event"])]
