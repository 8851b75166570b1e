"""What a decoder is: sizes, rotary embedding, head; nothing about files or about training.

A ``DecoderConfig`` is hashable, so that it can be a static argument of a jitted function, and
validated when made: whoever holds one may rely on it.
"""

from __future__ import annotations

import dataclasses

#: Names of the feed-forward activations that ``layers.py`` knows.
ACTIVATIONS = ("silu",)
#: Kinds of rotary scaling that ``rope.py`` knows.
ROPE_SCALING_KINDS = ("none", "linear", "llama3")


def _require_positive(config: object, names: tuple[str, ...]) -> None:
    for name in names:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(
                f"got {name} {value!r}; expected a whole number of at least 1; correct the config"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the positions that the model was pretrained on.

    ``linear`` divides every frequency by ``factor``. ``llama3`` (Llama 3.1 and later) divides those
    whose wavelength exceeds ``original_max_positions / low_freq_factor``, leaves those below
    ``original_max_positions / high_freq_factor`` alone, and interpolates between them.
    """

    kind: str = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192

    def __post_init__(self) -> None:
        if self.kind not in ROPE_SCALING_KINDS:
            raise ValueError(
                f"got RoPE scaling kind {self.kind!r}; expected one of {ROPE_SCALING_KINDS}; "
                "use a checkpoint with one of these"
            )
        if self.factor <= 0 or (self.kind == "none" and self.factor != 1.0):
            raise ValueError(
                f"got RoPE scaling kind {self.kind!r} with factor {self.factor}; expected a "
                "positive factor, and 1.0 for kind 'none'; set the kind that the factor belongs to"
            )
        _require_positive(self, ("original_max_positions",))
        if self.kind == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"got low_freq_factor {self.low_freq_factor} and high_freq_factor "
                f"{self.high_freq_factor}; expected 0 < low < high; correct the RoPE scaling"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The sizes and options of a Llama decoder."""

    vocab_size: int
    embed_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    rope_base: float
    norm_epsilon: float
    tie_embeddings: bool
    max_positions: int
    activation: str = "silu"
    rope_scaling: RopeScaling = RopeScaling()

    def __post_init__(self) -> None:
        _require_positive(
            self,
            (
                "vocab_size",
                "embed_dim",
                "num_layers",
                "num_heads",
                "num_kv_heads",
                "head_dim",
                "mlp_dim",
                "max_positions",
            ),
        )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"got num_heads {self.num_heads} and num_kv_heads {self.num_kv_heads}; expected "
                "whole groups of query heads; make num_kv_heads a divisor of num_heads"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"got head_dim {self.head_dim}; expected an even size, since rotary embeddings "
                "turn pairs; choose an even head_dim"
            )
        if self.rope_base <= 0 or self.norm_epsilon <= 0:
            raise ValueError(
                f"got rope_base {self.rope_base} and norm_epsilon {self.norm_epsilon}; expected "
                "both positive; correct the config"
            )
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"got activation {self.activation!r}; expected one of {ACTIVATIONS}; "
                "use a checkpoint with one of these"
            )
