"""What a decoder is: sizes and options; nothing about files or about training.

One config describes every family. The defaults are a Llama's; what Gemma does otherwise are
options of their own, each of which stands alone:

=========================  ========  ============  ============  ===========================
option                     Llama     Gemma 1       Gemma 2       Gemma 3
=========================  ========  ============  ============  ===========================
``activation``             silu      gelu_tanh     gelu_tanh     gelu_tanh
``embed_scale``            1         sqrt(D)       sqrt(D)       sqrt(D)
``norm_offset``            0         1             1             1
``post_norms``             no        no            yes           yes
``qk_norm``                no        no            no            yes
``query_scale``            1/sqrt(H) 1/sqrt(H)     its own       its own
soft caps                  none      none          both          none
``local_layers``           none      none          every other   five of six, own RoPE base
=========================  ========  ============  ============  ===========================

Llama's neighbours differ from it in one or two things each:

=========================  ======================================================================
Mistral                    ``local_layers``: all or none
Qwen 2, 2.5                ``attention_bias`` "qkv"; the upper layers may be local
Qwen 3                     ``qk_norm``; ``attention_bias`` "all" and local layers may be there
SmolLM3                    ``rope_layers``: three of four; Llama's biases may be there
OLMo 2                     ``pre_norms`` off, ``post_norms`` on; ``wide_qk_norm``
=========================  ======================================================================

Gemma 4 is a Gemma 3 with ``norm_offset`` 0 and ``query_scale`` 1 whose global layers may have heads
of their own shape (``global_head_dim``, ``num_global_kv_heads``, ``global_keys_as_values``), whose
last layers may read the keys and values of earlier ones (``num_kv_shared_layers``), and all of
whose layers may be told each token once more (``per_layer_dim``).

A ``DecoderConfig`` is hashable, so that it can be a static argument of a jitted function, and
validated when made: whoever holds one may rely on it.
"""

from __future__ import annotations

import dataclasses

from smoa_jax.checks import require

#: Names of the feed-forward activations that ``layers.py`` knows.
ACTIVATIONS = ("silu", "gelu_tanh")
#: Which projections of attention may have a bias: none; queries, keys and values; the output too.
ATTENTION_BIASES = ("none", "qkv", "all")
#: Kinds of rotary scaling that ``rope.py`` knows.
ROPE_SCALING_KINDS = ("none", "linear", "llama3", "proportional")


def _require_positive(config: object, names: tuple[str, ...]) -> None:
    for name in names:
        value = getattr(config, name)
        require(
            not isinstance(value, bool) and isinstance(value, int) and value >= 1,
            f"{name} {value!r}",
            "a whole number of at least 1",
            "correct the config",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the positions that the model was pretrained on.

    ``linear`` divides every frequency by ``factor``. ``llama3`` (Llama 3.1 and later) divides those
    whose wavelength exceeds ``original_max_positions / low_freq_factor``, leaves those below
    ``original_max_positions / high_freq_factor`` alone, and interpolates between them.
    ``proportional`` (Gemma 4) divides by ``factor`` and turns only the first ``rotated_share`` of a
    head's pairs, those of the highest frequencies.
    """

    kind: str = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    rotated_share: float = 1.0

    def __post_init__(self) -> None:
        require(
            self.kind in ROPE_SCALING_KINDS,
            f"RoPE scaling kind {self.kind!r}",
            f"one of {ROPE_SCALING_KINDS}",
            "use a checkpoint with one of these",
        )
        require(
            self.factor > 0 and (self.kind != "none" or self.factor == 1.0),
            f"RoPE scaling kind {self.kind!r} with factor {self.factor}",
            "a positive factor, and 1.0 for kind 'none'",
            "set the kind that the factor belongs to",
        )
        _require_positive(self, ("original_max_positions",))
        require(
            0 < self.rotated_share <= 1
            and (self.kind == "proportional" or self.rotated_share == 1),
            f"RoPE scaling kind {self.kind!r} with rotated_share {self.rotated_share}",
            "a share above 0 and up to 1, and 1 for all kinds but 'proportional'",
            "correct the RoPE scaling",
        )
        require(
            self.kind != "llama3" or 0 < self.low_freq_factor < self.high_freq_factor,
            f"low_freq_factor {self.low_freq_factor} and high_freq_factor {self.high_freq_factor}",
            "0 < low < high",
            "correct the RoPE scaling",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The sizes and options of a decoder.

    Args:
        vocab_size: V, rows of the embedding.
        embed_dim: D.
        num_layers: L.
        num_heads: N, query heads.
        num_kv_heads: K, key and value heads; a divisor of N.
        head_dim: H, even.
        mlp_dim: F.
        rope_base: Of the rotary embedding, of the global layers where there are local ones.
        norm_epsilon: Added to the mean square in every norm.
        tie_embeddings: Whether the embedding is the head, too.
        max_positions: Longest sequence.
        activation: Of the gated feed-forward layer: one of ``ACTIVATIONS``.
        rope_scaling: Stretching of the rotary frequencies; of the global layers alone.
        embed_scale: Factor of the embeddings, rounded to the compute dtype as they are.
        norm_offset: Norms scale by ``norm_offset + w``, in float32.
        post_norms: Whether the outputs of attention and feed-forward have norms of their own.
        qk_norm: Whether queries and keys are normed, head by head, before they are turned.
        query_scale: Factor of the attention scores; 0 for ``head_dim ** -0.5``.
        attention_bias: Which projections of attention have a bias: one of ``ATTENTION_BIASES``.
        mlp_bias: Whether those of the feed-forward layer have.
        pre_norms: Whether the inputs of attention and feed-forward are normed; where they are not,
            their outputs are.
        wide_qk_norm: Whether queries and keys are normed over all heads at once instead.
        rope_layers: Which layers turn queries and keys: one entry per layer, or none at all where
            all do.
        attention_soft_cap: c of ``c tanh(score / c)``, before the mask; 0 for none.
        final_soft_cap: Likewise of the logits; 0 for none.
        sliding_window: Tokens that a local layer's token sees, itself included; 0 without any.
        local_layers: Which layers are local: one entry per layer, or none at all.
        local_rope_base: Base of the local layers, unscaled; 0 for the same as the others'.
        value_norm: Whether values are normed, head by head, without a weight.
        global_head_dim: H of the layers that are not local; 0 for ``head_dim``.
        num_global_kv_heads: K of the layers that are not local; 0 for ``num_kv_heads``.
        global_keys_as_values: Whether those layers have no values of their own: what their key
            projection gives is both, values before keys are normed and turned.
        num_kv_shared_layers: How many of the last layers have no keys and values of their own and
            attend to those of the last layer before them that is local or global as they are.
        shared_mlp_dim: F of these layers; 0 for ``mlp_dim``.
        per_layer_dim: P, size of what every layer is told of each token beside the residual stream
            (per-layer embeddings); 0 for nothing.
        layer_scalars: Whether each layer ends by scaling the residual stream with its own number.
    """

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
    embed_scale: float = 1.0
    norm_offset: float = 0.0
    post_norms: bool = False
    qk_norm: bool = False
    query_scale: float = 0.0
    attention_bias: str = "none"
    mlp_bias: bool = False
    pre_norms: bool = True
    wide_qk_norm: bool = False
    rope_layers: tuple[bool, ...] = ()
    attention_soft_cap: float = 0.0
    final_soft_cap: float = 0.0
    sliding_window: int = 0
    local_layers: tuple[bool, ...] = ()
    local_rope_base: float = 0.0
    value_norm: bool = False
    global_head_dim: int = 0
    num_global_kv_heads: int = 0
    global_keys_as_values: bool = False
    num_kv_shared_layers: int = 0
    shared_mlp_dim: int = 0
    per_layer_dim: int = 0
    layer_scalars: bool = False

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
        for name in ("num_kv_heads", "num_global_kv_heads"):
            count = getattr(self, name)
            require(
                not count or self.num_heads % count == 0,
                f"num_heads {self.num_heads} and {name} {count}",
                "whole groups of query heads",
                f"make {name} a divisor of num_heads",
            )
        for name in ("head_dim", "global_head_dim"):
            require(
                getattr(self, name) % 2 == 0,
                f"{name} {getattr(self, name)}",
                "an even size, since rotary embeddings turn pairs",
                f"choose an even {name}",
            )
        require(
            self.rope_base > 0 and self.norm_epsilon > 0,
            f"rope_base {self.rope_base} and norm_epsilon {self.norm_epsilon}",
            "both positive",
            "correct the config",
        )
        require(
            self.activation in ACTIVATIONS,
            f"activation {self.activation!r}",
            f"one of {ACTIVATIONS}",
            "use a checkpoint with one of these",
        )
        self._check_options()

    @property
    def attention_scale(self) -> float:
        """The factor of the attention scores."""
        return self.query_scale or self.head_dim**-0.5

    def _check_options(self) -> None:
        for name in ("query_scale", "attention_soft_cap", "final_soft_cap", "local_rope_base"):
            require(getattr(self, name) >= 0, f"{name} {getattr(self, name)}", "0 (off) or more")
        require(self.embed_scale > 0, f"embed_scale {self.embed_scale}", "a positive factor")
        require(
            self.attention_bias in ATTENTION_BIASES,
            f"attention_bias {self.attention_bias!r}",
            f"one of {ATTENTION_BIASES}",
        )
        require(
            self.pre_norms or self.post_norms,
            "neither pre_norms nor post_norms",
            "norms before attention and feed-forward, after them, or both",
        )
        require(
            not (self.qk_norm and self.wide_qk_norm),
            "both qk_norm and wide_qk_norm",
            "at most one of them",
        )
        require(
            not self.rope_layers or len(self.rope_layers) == self.num_layers,
            f"rope_layers of {len(self.rope_layers)} entries for {self.num_layers} layers",
            "one entry per layer, or none at all",
        )
        require(
            not self.local_layers or len(self.local_layers) == self.num_layers,
            f"local_layers of {len(self.local_layers)} entries for {self.num_layers} layers",
            "one entry per layer, or none at all",
        )
        has_local = any(self.local_layers)
        require(
            has_local == (self.sliding_window > 0) and (not self.local_rope_base or has_local),
            f"sliding_window {self.sliding_window}, local_rope_base {self.local_rope_base} and "
            f"{sum(self.local_layers)} local layers",
            "a window of at least 1 where there are local layers, and neither where there are none",
        )
        self._check_shapes()

    def _check_shapes(self) -> None:
        for name in (
            "global_head_dim",
            "num_global_kv_heads",
            "num_kv_shared_layers",
            "shared_mlp_dim",
            "per_layer_dim",
        ):
            value = getattr(self, name)
            require(isinstance(value, int) and value >= 0, f"{name} {value!r}", "0 (off) or more")
        require(
            not self.global_head_dim or not self.local_layers or self.local_rope_base > 0,
            f"global_head_dim {self.global_head_dim} without a local_rope_base",
            "the local layers' own RoPE base, since their heads turn otherwise",
        )
        own = self.num_layers - self.num_kv_shared_layers
        local = self.local_layers or (False,) * self.num_layers
        require(
            own > 0 and set(local[own:]) <= set(local[: max(own, 0)]),
            f"num_kv_shared_layers {self.num_kv_shared_layers} of {self.num_layers} layers",
            "before the first of them, a layer of each kind (local, global) that is among them",
        )
