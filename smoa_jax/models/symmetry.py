"""Which coordinates of a decoder can have other labels without a change in what it computes.

The residual stream's, once for the whole model; each layer's feed-forward coordinates; and groups
of heads, a key/value head with the queries that read it. Within a head RoPE and the heads' norms
tell coordinates apart, and where layers read an earlier layer's keys and values, all of a kind keep
one order of groups.
"""

from __future__ import annotations

from smoa_jax.adapter.planning.aligned import AxisTable, SharedAxis
from smoa_jax.models.config import DecoderConfig
from smoa_jax.models.stacks import Stack, layer_stacks

_RESIDUAL = SharedAxis("residual")


def shared_axes(config: DecoderConfig) -> AxisTable:
    """Of every tensor of ``abstract_params`` that has such coordinates, which they are.

    >>> spectra = plan_spectra(base.params, config, shared_axes=shared_axes(base.config))
    """
    table: dict[tuple[str, ...], tuple[SharedAxis | None, ...]] = {
        ("embed_tokens", "embedding"): (None, _RESIDUAL),
        ("per_layer_model_projection", "kernel"): (_RESIDUAL, None),
        ("norm", "scale"): (_RESIDUAL,),
        ("lm_head", "kernel"): (_RESIDUAL, None),
    }
    stacks = layer_stacks(config)
    kinds = {stack.kind for stack in stacks if stack.shape.shares_kv}
    for stack in stacks:
        for path, axes in _stack_axes(config, stack, stack.kind in kinds).items():
            table[*stack.path, *path] = axes
    return table


def _stack_axes(
    config: DecoderConfig, stack: Stack, shares_kv: bool
) -> dict[tuple[str, ...], tuple[SharedAxis | None, ...]]:
    name = "/".join(stack.path)
    mlp = SharedAxis(f"{name}/mlp", per_layer=True)
    heads = SharedAxis(
        f"heads of {stack.kind} layers" if shares_kv else f"{name}/heads",
        per_layer=not shares_kv,
        groups=stack.shape.num_kv_heads,
    )
    projections = {
        ("self_attn", "q_proj"): (_RESIDUAL, heads),
        ("self_attn", "k_proj"): (_RESIDUAL, heads),
        ("self_attn", "v_proj"): (_RESIDUAL, heads),
        ("self_attn", "o_proj"): (heads, _RESIDUAL),
        ("mlp", "gate_proj"): (_RESIDUAL, mlp),
        ("mlp", "up_proj"): (_RESIDUAL, mlp),
        ("mlp", "down_proj"): (mlp, _RESIDUAL),
        ("per_layer_input_gate",): (_RESIDUAL, None),
        ("per_layer_projection",): (None, _RESIDUAL),
    }
    norms = (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
        "post_per_layer_input_norm",
    )
    axes: dict[tuple[str, ...], tuple[SharedAxis | None, ...]] = {
        (norm, "scale"): (_RESIDUAL,) for norm in norms
    }
    for path, (inputs, outputs) in projections.items():
        axes[*path, "kernel"] = (inputs, outputs)
        axes[*path, "bias"] = (outputs,)
    if config.wide_qk_norm:
        axes["self_attn", "q_norm", "scale"] = axes["self_attn", "k_norm", "scale"] = (heads,)
    return axes
