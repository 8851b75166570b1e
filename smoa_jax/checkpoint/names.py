"""One table of tensor names: Hugging Face's, GGUF's and the path in our params tree.

Reading and writing walk the same rows, so a name can't drift between them. On disk every layer has
tensors of its own and a linear layer is ``(outputs, inputs)``; in the tree all layers are one stack
with a leading L and a kernel is ``(inputs, outputs)``:

    model.layers.3.mlp.up_proj.weight  (F, D)   <->   layers/mlp/up_proj/kernel[3]  (D, F)

A ``TensorSlot`` is one row made concrete for a given tree: a tensor on disk and its place in it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, TypeAlias

from smoa_jax.adapter.targets import walk
from smoa_jax.checkpoint.errors import listed
from smoa_jax.checks import require

#: Keys from the root of the params tree to one array.
TreePath: TypeAlias = tuple[str, ...]

#: The top-level key whose arrays stack all layers along their first axis.
LAYERS_KEY = "layers"


@dataclasses.dataclass(frozen=True, kw_only=True)
class NameRule:
    """One row of the table; ``{layer}`` in a name stands for the layer's index."""

    name: str
    gguf_name: str
    path: TreePath
    transpose: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorSlot:
    """One tensor on disk and its place in the params tree."""

    name: str
    gguf_name: str
    path: TreePath
    layer: int | None  # index into the stack; None for what is not stacked
    transpose: bool
    shape: tuple[int, ...]  # as on disk: (outputs, inputs) for a kernel


def _layer_rule(module: str, gguf_module: str, leaf: str) -> NameRule:
    ending = "bias" if leaf == "bias" else "weight"
    return NameRule(
        name=f"model.layers.{{layer}}.{module}.{ending}",
        gguf_name=f"blk.{{layer}}.{gguf_module}.{ending}",
        path=(LAYERS_KEY, *module.split("."), leaf),
        transpose=leaf == "kernel",
    )


def name_rules(*, post_norms: bool) -> tuple[NameRule, ...]:
    """The table of a model with or without post-norms, in the order in which it runs.

    Hugging Face calls Llama's second norm and Gemma 2's norm of what attention gives by the same
    name; GGUF tells them apart.
    """
    before_mlp = _layer_rule("pre_feedforward_layernorm", "ffn_norm", "scale")
    after_mlp = _layer_rule("post_feedforward_layernorm", "post_ffw_norm", "scale")
    after_attention = "post_attention_norm" if post_norms else "ffn_norm"
    return (
        NameRule(
            name="model.embed_tokens.weight",
            gguf_name="token_embd.weight",
            path=("embed_tokens", "embedding"),
        ),
        _layer_rule("input_layernorm", "attn_norm", "scale"),
        _layer_rule("self_attn.q_proj", "attn_q", "kernel"),
        _layer_rule("self_attn.k_proj", "attn_k", "kernel"),
        _layer_rule("self_attn.v_proj", "attn_v", "kernel"),
        _layer_rule("self_attn.q_proj", "attn_q", "bias"),
        _layer_rule("self_attn.k_proj", "attn_k", "bias"),
        _layer_rule("self_attn.v_proj", "attn_v", "bias"),
        _layer_rule("self_attn.q_norm", "attn_q_norm", "scale"),
        _layer_rule("self_attn.k_norm", "attn_k_norm", "scale"),
        _layer_rule("self_attn.o_proj", "attn_output", "kernel"),
        _layer_rule("self_attn.o_proj", "attn_output", "bias"),
        _layer_rule("post_attention_layernorm", after_attention, "scale"),
        *((before_mlp,) if post_norms else ()),
        _layer_rule("mlp.gate_proj", "ffn_gate", "kernel"),
        _layer_rule("mlp.up_proj", "ffn_up", "kernel"),
        _layer_rule("mlp.down_proj", "ffn_down", "kernel"),
        _layer_rule("mlp.gate_proj", "ffn_gate", "bias"),
        _layer_rule("mlp.up_proj", "ffn_up", "bias"),
        _layer_rule("mlp.down_proj", "ffn_down", "bias"),
        *((after_mlp,) if post_norms else ()),
        NameRule(name="model.norm.weight", gguf_name="output_norm.weight", path=("norm", "scale")),
        NameRule(
            name="lm_head.weight",
            gguf_name="output.weight",
            path=("lm_head", "kernel"),
            transpose=True,
        ),
    )


#: Every row, for whom GGUF's names don't matter.
NAME_RULES: tuple[NameRule, ...] = name_rules(post_norms=True)

EMBEDDING_NAME = NAME_RULES[0].name
HEAD_NAME = NAME_RULES[-1].name

# Buffers that some writers store although the config already says what they hold.
_HARMLESS = re.compile(r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


def is_harmless(name: str) -> bool:
    """Whether a surplus tensor of this Hugging Face name may be left unread."""
    return _HARMLESS.fullmatch(name) is not None


def name_of_gguf(gguf_name: str, *, post_norms: bool) -> str | None:
    """The Hugging Face name of a GGUF tensor, or None for one that the table doesn't know."""
    for rule in name_rules(post_norms=post_norms):
        pattern = re.escape(rule.gguf_name).replace(re.escape("{layer}"), r"(\d+)")
        if match := re.fullmatch(pattern, gguf_name):
            return rule.name.format(layer=int(match.group(1))) if match.groups() else rule.name
    return None


def unflatten_tree(leaves: Mapping[TreePath, Any]) -> dict[str, Any]:
    """The nested dict whose leaves these are, by path."""
    tree: dict[str, Any] = {}
    for path, value in leaves.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = value
    return tree


def tensor_slots(params: Mapping[str, Any]) -> dict[str, TensorSlot]:
    """Every tensor on disk that ``params`` (arrays or abstract ones) stands for, by its name.

    In the order of the table, layer by layer. Raises ValueError for an array that has no row here,
    such as the modulation of an adapter that has not been merged.
    """
    leaves = dict(walk(params))
    post_norms = any("post_feedforward_layernorm" in path for path in leaves)
    rules = {rule.path: rule for rule in name_rules(post_norms=post_norms)}
    unknown = ["/".join(path) for path in leaves if path not in rules]
    require(
        not unknown,
        f"a params tree with {listed(unknown)}, which no Hugging Face tensor stands for",
        "a plain tree of the decoder: merge the adapter first",
    )
    present = [rule for rule in rules.values() if rule.path in leaves]
    depths = {leaves[rule.path].shape[0] for rule in present if rule.path[0] == LAYERS_KEY}
    require(len(depths) <= 1, f"stacks of {sorted(depths)} layers", "one number for all")
    num_layers = depths.pop() if depths else 0

    slots: dict[str, TensorSlot] = {}
    for rule in [rule for rule in present if rule.path == ("embed_tokens", "embedding")]:
        slots.update([_slot(rule, None, leaves)])
    for layer in range(num_layers):
        slots.update(_slot(rule, layer, leaves) for rule in present if rule.path[0] == LAYERS_KEY)
    for rule in present:
        if rule.path[0] != LAYERS_KEY and rule.name not in slots:
            slots.update([_slot(rule, None, leaves)])
    return slots


def _slot(
    rule: NameRule, layer: int | None, leaves: Mapping[TreePath, Any]
) -> tuple[str, TensorSlot]:
    shape = tuple(leaves[rule.path].shape)
    if layer is not None:
        shape = shape[1:]
    name = rule.name.format(layer=layer)
    slot = TensorSlot(
        name=name,
        gguf_name=rule.gguf_name.format(layer=layer),
        path=rule.path,
        layer=layer,
        transpose=rule.transpose,
        shape=shape[::-1] if rule.transpose else shape,
    )
    return name, slot
