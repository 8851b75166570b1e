"""Names in a PEFT adapter: which module a tensor belongs to, and which of ours that module is.

PEFT prefixes the names of the model it wraps, and that model need not be a plain decoder: since
transformers 5 the text part of a multimodal Gemma 3 is ``model.language_model``, before that it was
``language_model.model``.

    base_model.model.model.layers.3.mlp.up_proj.lora_A.weight
    base_model.model.model.language_model.layers.3.mlp.up_proj.lora_A.default.weight
    base_model.model.language_model.model.layers.3.mlp.up_proj.hira_A
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from smoa_jax.checkpoint.huggingface.config import config_from_hf, is_multimodal
from smoa_jax.checkpoint.huggingface.multimodal import text_name
from smoa_jax.checkpoint.names import NAME_RULES, TreePath, unstacked_path
from smoa_jax.models.stacks import Stack, layer_stacks

TENSORS_FILE = "adapter_model.safetensors"
PEFT_CONFIG_FILE = "adapter_config.json"
#: What PEFT puts before the names of the model that it wraps.
PEFT_PREFIX = "base_model.model."
#: Where transformers 5 keeps the decoder of a multimodal model, without its head.
MULTIMODAL_TEXT_MODEL = "model.language_model"

#: From a module's path in the tree and its layer (None when not stacked) to its dotted name in the
#: Hugging Face model.
ModuleName: TypeAlias = Callable[[TreePath, int | None], str]

_FACTOR = re.compile(
    r"(?P<module>.+)\.(?:"
    r"lora_(?P<lora>[AB])(?:\.(?P<lora_adapter>[^.]+))?\.weight|"
    r"hira_(?P<hira>[AB])(?:\.(?P<hira_adapter>[^.]+))?)"
)


class FactorName(NamedTuple):
    """A tensor's name, taken apart."""

    module: str  # in the model that PEFT wrapped
    kind: str  # "lora" or "hira"
    factor: str  # "A" or "B"
    adapter: str  # "" where the file doesn't name it, as PEFT's own files don't


def parse_factor(name: str) -> FactorName | None:
    """The parts of the name of a LoRA or HiRA factor; None for any other tensor."""
    match = _FACTOR.fullmatch(name.removeprefix(PEFT_PREFIX))
    if match is None:
        return None
    kind = "lora" if match["lora"] else "hira"
    return FactorName(match["module"], kind, match[kind], match[f"{kind}_adapter"] or "")


def decoder_module_name(
    path: TreePath,
    layer: int | None,
    *,
    text_model: str = "model",
    stacks: Sequence[Stack] = (),
) -> str:
    """The name of a module of our own decoder: ``model.layers.3.self_attn.q_proj``.

    Args:
        path: Of the module in our tree.
        layer: Index into its stack; None for what isn't stacked.
        text_model: Where the decoder without its head lies in the Hugging Face model.
        stacks: Of the decoder's layers, if it has several.

    Raises:
        ValueError: for a path that is none of its modules.
    """
    plain, stack = unstacked_path(tuple(path), stacks)
    if stack is not None and layer is not None:
        layer = stack.layers[layer]
    for rule in NAME_RULES:
        if rule.path[:-1] == plain:
            name = rule.name.format(layer=layer).removesuffix(".weight")
            return re.sub(r"^model(?=\.)", lambda _: text_model, name)
    raise ValueError(
        f"got an adapter at {'/'.join(path)}, which is no module of our decoder; expected one of "
        "its modules; give hf_module_name for another model"
    )


def module_naming(hf_config: Mapping[str, Any]) -> ModuleName:
    """How transformers names the decoder's modules in the model that a ``config.json`` describes.

    >>> export_peft(..., hf_module_name=module_naming(base.hf_config))
    """
    settings: dict[str, Any] = {}
    if is_multimodal(hf_config):
        settings["text_model"] = MULTIMODAL_TEXT_MODEL
    if len(stacks := layer_stacks(config_from_hf(hf_config))) > 1:
        settings["stacks"] = stacks
    return functools.partial(decoder_module_name, **settings) if settings else decoder_module_name


def plain_module_name(name: str) -> str:
    """The name that a module of the text part of a multimodal model has in a plain decoder."""
    weight = f"{name}.weight"
    return (text_name(weight) or weight).removesuffix(".weight")


def is_part_of_more(name: str, layer: int | None) -> bool:
    """Whether a stacked module lies deeper than ``model.layers``, in one part of several.

    Names of the other parts may then end as this one does, as those of a vision tower do.
    """
    stack = name.split(f".{layer}.")[0]
    return layer is not None and stack.count(".") > 1
