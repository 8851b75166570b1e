"""One run, described whole: what a YAML file holds and what is written beside its checkpoint.

Every field has a default but the base model and the output directory, and everything is validated
when it is made, before any weight is read.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, get_args

from smoa_jax.adapter.config import SmoaConfig
from smoa_jax.checks import require
from smoa_jax.data.config import DataConfig
from smoa_jax.evaluation.answers import check_task
from smoa_jax.models.options import AttentionName, RematName
from smoa_jax.sharding.mesh import MeshConfig
from smoa_jax.sharding.processes import DistributedConfig
from smoa_jax.sharding.rules import DECODER_RULES, parse_rule

DType = Literal["float32", "bfloat16"]
Schedule = Literal["linear", "cosine", "constant"]

#: Learning rates where none is given: the members whose factors multiply the weight want about ten
#: times those that add to it (docs/method.md, "Learning rates seen").
DEFAULT_LEARNING_RATES = {"none": 1e-3, "weight": 1e-2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The frozen base.

    Args:
        path: Hugging Face directory, GGUF file, or a name on the hub.
        dtype: Of the weights in memory; ``auto`` is float32 on CPU and bfloat16 elsewhere.
        compute_dtype: Of activations; ``auto`` likewise.
        remat: What a layer keeps for its backward pass, from most memory to least: ``none``
            (everything), ``dots``, ``dots_no_batch``, ``projections`` or ``full`` (its input).
        attention: Of whole sequences: ``xla``, everywhere; ``splash``, on a TPU; ``cudnn``, on an
            NVIDIA GPU; ``auto`` takes what devices, model and row lengths are fit for.
        sharding_rules: Path pattern -> mesh axis of each dimension; empty: the decoder's own.
        spectra_cache: Directory in which spectra are kept between runs; ``auto``: the user's cache
            directory, which ``SMOA_JAX_CACHE`` moves or disables; ``off`` or empty: none is kept.
    """

    path: str
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    remat: RematName = "projections"
    attention: AttentionName = "auto"
    sharding_rules: dict[str, str] = dataclasses.field(default_factory=lambda: dict(DECODER_RULES))
    spectra_cache: str = "auto"

    def __post_init__(self) -> None:
        require(bool(self.path), "an empty model.path", "a directory or a GGUF file")
        for name in ("dtype", "compute_dtype"):
            require(
                getattr(self, name) in ("auto", *get_args(DType)),
                f"model.{name}={getattr(self, name)!r}",
                "auto, float32 or bfloat16",
            )
        require(
            self.remat in get_args(RematName),
            f"model.remat={self.remat!r}",
            f"one of {', '.join(get_args(RematName))}",
        )
        require(
            self.attention in get_args(AttentionName),
            f"model.attention={self.attention!r}",
            f"one of {', '.join(get_args(AttentionName))}",
        )
        for pattern, text in self.sharding_rules.items():
            parse_rule(pattern, text)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its schedule.

    Args:
        learning_rate: The highest; unless given, 1e-2 where factors multiply the weight, else 1e-3.
        warmup_steps: Linear warm-up from 0.
        max_warmup_share: Of a run's steps that its warm-up may take; a longer one is cut, and the
            run says so.
        schedule: After the warm-up: ``linear`` or ``cosine`` decay to ``final_fraction``, or
            ``constant``.
        final_fraction: Of the peak, reached at the last step.
        weight_decay: On the factors, decoupled.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        epsilon: Added to the root of the second moment.
        clip_norm: Largest global norm of a gradient; 0: no clipping.
    """

    learning_rate: float | None = None
    warmup_steps: int = 100
    max_warmup_share: float = 0.1
    schedule: Schedule = "linear"
    final_fraction: float = 0.0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        require(
            self.learning_rate is None
            or (math.isfinite(self.learning_rate) and self.learning_rate > 0),
            f"optimizer.learning_rate={self.learning_rate}",
            "a positive number",
        )
        require(
            self.schedule in get_args(Schedule),
            f"optimizer.schedule={self.schedule!r}",
            "linear, cosine or constant",
        )
        for name in ("warmup_steps", "weight_decay", "clip_norm"):
            require(
                getattr(self, name) >= 0, f"optimizer.{name}={getattr(self, name)}", "0 or more"
            )
        for name in ("final_fraction", "max_warmup_share"):
            require(
                0 <= getattr(self, name) <= 1, f"optimizer.{name}={getattr(self, name)}", "0 to 1"
            )
        for name in ("beta1", "beta2"):  # at 1 a moment would never move, and its bias divide by 0
            require(
                0 <= getattr(self, name) < 1,
                f"optimizer.{name}={getattr(self, name)}",
                "0 to below 1",
            )
        require(self.epsilon > 0, f"optimizer.epsilon={self.epsilon}", "a positive number")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop.

    Args:
        output_dir: Where everything of the run lies; must not hold another run.
        steps: Optimizer steps in all; 0: as many as ``epochs`` take.
        epochs: Passes over the data, when ``steps`` is 0.
        batch_size: Rows of a global batch, accumulation included.
        accumulate: Parts that a batch is computed in, one after the other.
        seed: Of the initial draw and of dropout.
        eval_every: Steps between evaluations on held-out rows; 0: only at the end.
        patience: Evaluations (of ``eval_every``) without a lower held-out loss after which the run
            ends; 0: never.
        eval_batch_size: Rows of an evaluation batch; 0: ``batch_size / accumulate``.
        save_every: Steps between checkpoints; 0: only at the end.
        keep_last: Newest checkpoints to keep.
        keep_best: Best checkpoints to keep, by held-out loss.
        max_skipped: Steps with a loss or gradient that is not finite before the run stops.
        loss_chunk: Positions whose logits exist at a time.
        tensorboard: Write TensorBoard files too (needs the extra ``track``).
        wandb: Project of Weights & Biases to send metrics to (needs the extra ``track``).
    """

    output_dir: str
    steps: int = 0
    epochs: float = 1.0
    batch_size: int = 32
    accumulate: int = 1
    seed: int = 0
    eval_every: int = 0
    patience: int = 0
    eval_batch_size: int = 0
    save_every: int = 0
    keep_last: int = 2
    keep_best: int = 1
    max_skipped: int = 10
    loss_chunk: int = 64
    tensorboard: bool = False
    wandb: str = ""

    def __post_init__(self) -> None:
        require(bool(self.output_dir), "an empty train.output_dir", "a directory for the run")
        for name in ("batch_size", "accumulate", "keep_last", "loss_chunk"):
            require(getattr(self, name) >= 1, f"train.{name}={getattr(self, name)}", "at least 1")
        for name in (
            "steps",
            "seed",
            "eval_every",
            "patience",
            "eval_batch_size",
            "save_every",
            "keep_best",
            "max_skipped",
        ):
            require(getattr(self, name) >= 0, f"train.{name}={getattr(self, name)}", "0 or more")
        require(
            not self.patience or self.eval_every > 0,
            f"train.patience={self.patience} without evaluations",
            "train.eval_every above 0",
            "set it, or leave patience out",
        )
        require(
            self.steps != 0 or self.epochs > 0,
            "train.steps=0 and no epochs",
            "one of them positive",
        )
        require(
            self.batch_size % self.accumulate == 0,
            f"train.batch_size={self.batch_size} in train.accumulate={self.accumulate} parts",
            "a multiple",
            "change one of them",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationEvalConfig:
    """Scoring held-out questions by free generation, before and after training.

    Args:
        rows: Questions to score, from the start of the held-out rows; 0: no scoring.
        max_new_tokens: Longest answer.
        batch_size: Questions at a time.
        answer: How an answer is found in the text: ``exact``, the whole of it, spaces and letter
            case aside; ``number``, its last number; ``equation``, the value of its first line;
            ``choice``, its first label.
        task: A task of the papers whose labels ``choice`` looks for, such as boolq; empty: the
            labels of all of them.
        before: Score the base model too.
    """

    rows: int = 0
    max_new_tokens: int = 16
    batch_size: int = 32
    answer: Literal["exact", "number", "equation", "choice"] = "exact"
    task: str = ""
    before: bool = True

    def __post_init__(self) -> None:
        require(
            self.rows >= 0 and self.max_new_tokens >= 1 and self.batch_size >= 1,
            f"evaluation.rows={self.rows}, max_new_tokens={self.max_new_tokens}, "
            f"batch_size={self.batch_size}",
            "at least 0, 1 and 1",
        )
        check_task(self.task, self.answer)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run, as a file in ``configs/`` holds it."""

    model: ModelConfig
    train: TrainConfig
    adapter: SmoaConfig = dataclasses.field(default_factory=SmoaConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)
    evaluation: GenerationEvalConfig = dataclasses.field(default_factory=GenerationEvalConfig)

    @property
    def learning_rate(self) -> float:
        """The peak learning rate: the one given, or the method's default."""
        given = self.optimizer.learning_rate
        return DEFAULT_LEARNING_RATES[self.adapter.modulation] if given is None else given
