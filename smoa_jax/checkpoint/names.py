"""One table of tensor names: Hugging Face's, GGUF's and the path in our params tree.

Reading and writing walk the same rows, so a name can't drift between them. On disk every layer has
tensors of its own and a linear layer is ``(outputs, inputs)``; in the tree equal layers are one
stack with a leading axis and a kernel is ``(inputs, outputs)``:

    model.layers.3.mlp.up_proj.weight  (F, D)   <->   layers/mlp/up_proj/kernel[3]  (D, F)

Where layers differ in shape there are several stacks, each of which knows its layers
(``models/stacks.py``); for layer 7 of a Gemma 4 whose layers 4, 9 ... are global:

    model.layers.7.mlp.up_proj.weight  (F, D)   <->   layers/local/mlp/up_proj/kernel[6]  (D, F)

A ``TensorSlot`` is one row made concrete for a given tree: a tensor on disk and its place in it.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from smoa_jax.adapter.targets import walk
from smoa_jax.checkpoint.errors import listed
from smoa_jax.checks import require
from smoa_jax.models.config import DecoderConfig
from smoa_jax.models.stacks import LAYERS_KEY, Stack, layer_stacks

#: Keys from the root of the params tree to one array.
TreePath: TypeAlias = tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NameRule:
    """One row of the table; ``{layer}`` in a name stands for the layer's index in the model.

    The path of what is stacked leads through ``layers`` alone, whatever stacks there are.
    """

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
    layer: int | None  # index into its stack, not the model's; None for what is not stacked
    number: int | None  # of the layer in the model
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


def _top_rule(module: str, gguf_module: str, leaf: str) -> NameRule:
    return NameRule(
        name=f"model.{module}.weight",
        gguf_name=f"{gguf_module}.weight",
        path=(*module.split("."), leaf),
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
        _top_rule("embed_tokens", "token_embd", "embedding"),
        _top_rule("embed_tokens_per_layer", "per_layer_token_embd", "embedding"),
        _top_rule("per_layer_model_projection", "per_layer_model_proj", "kernel"),
        _top_rule("per_layer_projection_norm", "per_layer_proj_norm", "scale"),
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
        _layer_rule("per_layer_input_gate", "inp_gate", "kernel"),
        _layer_rule("per_layer_projection", "proj", "kernel"),
        _layer_rule("post_per_layer_input_norm", "post_norm", "scale"),
        NameRule(
            name="model.layers.{layer}.layer_scalar",
            gguf_name="blk.{layer}.layer_output_scale.weight",
            path=(LAYERS_KEY, "layer_scalar"),
        ),
        _top_rule("norm", "output_norm", "scale"),
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

_UNUSED = re.compile(r"model\.layers\.(\d+)\.self_attn\.(?:[kv]_proj|[kv]_norm)\.weight")


def is_harmless(name: str) -> bool:
    """Whether a surplus tensor of this Hugging Face name may be left unread."""
    return _HARMLESS.fullmatch(name) is not None


def is_unused(name: str, config: DecoderConfig) -> bool:
    """Whether a tensor of this Hugging Face name is one that the decoder has no use for.

    Google ships keys and values also for the layers of a Gemma 4 that read those of others, and
    other programs want them to be there: an export copies them.
    """
    match = _UNUSED.fullmatch(name)
    if match is None:
        return False
    sharing = [stack.layers for stack in layer_stacks(config) if stack.shape.shares_kv]
    return any(int(match[1]) in layers for layers in sharing)


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


def layer_numbers(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """The model's indices of the layers in each stack, by the stack's dotted path.

    Empty for a model of one stack, where the two are the same. Adapters take it as
    ``SmoaConfig.layer_numbers``.
    """
    stacks = layer_stacks(config)
    return {".".join(stack.path): stack.layers for stack in stacks} if len(stacks) > 1 else {}


def unstacked_path(path: TreePath, stacks: Sequence[Stack]) -> tuple[TreePath, Stack | None]:
    """A path of the tree as the table has it, without the name of its stack; and the stack."""
    for stack in stacks:
        if path[: len(stack.path)] == stack.path:
            return (LAYERS_KEY, *path[len(stack.path) :]), stack
    return path, None


def tensor_slots(params: Mapping[str, Any], config: DecoderConfig) -> dict[str, TensorSlot]:
    """Every tensor on disk that ``params`` (arrays or abstract ones) stands for, by its name.

    In the order of the table, layer by layer. Raises ValueError for an array that has no row here,
    such as the modulation of an adapter that has not been merged.
    """
    rules = {rule.path: rule for rule in name_rules(post_norms=config.post_norms)}
    stacks = layer_stacks(config)
    leaves: dict[tuple[TreePath, int | None], tuple[TreePath, int | None, Any]] = {}
    unknown = []
    for path, leaf in walk(params):
        plain, stack = unstacked_path(path, stacks)
        if plain not in rules:
            unknown.append("/".join(path))
        elif stack is None:
            leaves[plain, None] = (path, None, leaf)
        else:
            require(
                leaf.shape[0] == len(stack.layers),
                f"{'/'.join(path)} of {leaf.shape[0]} layers",
                f"{len(stack.layers)}, as the config has",
            )
            for index, layer in enumerate(stack.layers):
                leaves[plain, layer] = (path, index, leaf)
    require(
        not unknown,
        f"a params tree with {listed(unknown)}, which no Hugging Face tensor stands for",
        "a plain tree of the decoder: merge the adapter first",
    )
    slots: dict[str, TensorSlot] = {}
    for in_layers, group in itertools.groupby(rules.values(), lambda r: r.path[0] == LAYERS_KEY):
        rows = list(group)
        for layer in range(config.num_layers) if in_layers else (None,):
            for rule in rows:
                if (rule.path, layer) in leaves:
                    slot = _slot(rule, layer, *leaves[rule.path, layer])
                    slots[slot.name] = slot
    return slots


def _slot(
    rule: NameRule, layer: int | None, path: TreePath, index: int | None, leaf: Any
) -> TensorSlot:
    shape = tuple(leaf.shape) if layer is None else tuple(leaf.shape[1:])
    return TensorSlot(
        name=rule.name.format(layer=layer),
        gguf_name=rule.gguf_name.format(layer=layer),
        path=path,
        layer=index,
        number=layer,
        transpose=rule.transpose,
        shape=shape[::-1] if rule.transpose else shape,
    )
