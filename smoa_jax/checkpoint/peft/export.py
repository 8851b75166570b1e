"""An adapter as a directory that stock PEFT opens, for what PEFT has.

| here                                      | there                                             |
|-------------------------------------------|---------------------------------------------------|
| no modulation: LoRA, MELoRA, other blocks | LoRA, ``lora_A`` = Ã^T and ``lora_B`` = B̃         |
| weight-modulated: HiRA, SMoA's blocks     | HiRA, ``hira_A`` = Ã^T and ``hira_B`` = s B̃       |
| spectral bands                            | nothing: their G_m are matrices of their own      |

Ã and B̃ are the factors with every row in its own block's columns and zeros elsewhere
(docs/method.md, "Blocks are HiRA with masked factors"); padding is left out, so they have R
columns. PEFT's LoRA scales by alpha / r (or its square root), as here. Its HiRA doesn't scale at
all, so s goes into B̃, and as of 0.21.2 doesn't heed ``rank_pattern`` when it opens an adapter, so
all its modules get the largest rank, the smaller ones with zeros.

The result equals the adapter. Trained on in PEFT it would not stay one of ours: PEFT knows no mask.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from smoa_jax.adapter.config import SmoaConfig
from smoa_jax.adapter.factors import unpadded_factors
from smoa_jax.adapter.targets import walk
from smoa_jax.adapter.tree import find_modulations
from smoa_jax.adapter.types import Bands, Modulation, Params, is_modulation
from smoa_jax.checkpoint.card import CARD_FILE, model_card
from smoa_jax.checkpoint.directories import replaced_directory
from smoa_jax.checkpoint.names import TreePath
from smoa_jax.checkpoint.peft.names import (
    PEFT_CONFIG_FILE,
    PEFT_PREFIX,
    TENSORS_FILE,
    ModuleName,
    decoder_module_name,
    is_part_of_more,
)
from smoa_jax.checks import require
from smoa_jax.storage import located


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Module:
    """One adapted module of the Hugging Face model, factors as (rank, in) and (out, rank)."""

    path: TreePath
    layer: int | None
    name: str
    a: np.ndarray
    b: np.ndarray
    scale: float


def export_peft(
    params: Params,
    config: SmoaConfig,
    directory: str | Path,
    *,
    base_model_name: str,
    hf_module_name: ModuleName = decoder_module_name,
    facts: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write an adapter as ``PeftModel.from_pretrained`` opens it.

    >>> export_peft(params, config, "peft", base_model_name="HuggingFaceTB/SmolLM2-135M-Instruct")

    Args:
        params: The adapted tree, on one process's devices.
        config: The one that it was made with.
        directory: To be made; holds all or nothing, whenever the process dies.
        base_model_name: Name or path of the base for PEFT to load.
        hf_module_name: Names of the modules as PEFT will see them: ``module_naming(hf_config)``
            for the decoder of a multimodal model, a function of your own for another tree. A
            stacked kernel needs one name per layer.
        facts: For its README, by name, such as ``read_adapter(directory).said``.
        overwrite: Replace an exported adapter; any other occupied directory is refused still.

    Returns:
        The directory.

    Raises:
        ValueError: for spectral bands, or if ``params`` and ``config`` don't belong together.
        CheckpointError: if the directory is occupied.
    """
    require(
        config.partition != "spectral_bands",
        "an adapter of spectral bands for PEFT, which modulates by the whole weight and has no "
        "place for a part of its spectrum",
        "blocks or no partition",
        "export the merged model instead (merge_smoa, then a Hugging Face directory)",
    )
    found = find_modulations(params)
    require(bool(found), "params without any adapter", "a tree from apply_smoa")
    modules = [
        module
        for path, node, _ in found.values()
        for module in _modules(path, node, config, hf_module_name)
    ]
    kind = "hira" if config.modulation == "weight" else "lora"
    fields = _config_fields(kind, config, modules, _targets(params, modules, hf_module_name))
    target = located(directory)
    with replaced_directory(
        target, marker=PEFT_CONFIG_FILE, what="a PEFT adapter", overwrite=overwrite
    ) as draft:
        tensors = _tensors(kind, modules)
        save_file(tensors, draft / TENSORS_FILE, metadata={"format": "pt"})
        fields = {"base_model_name_or_path": base_model_name, **fields}
        text = json.dumps(fields, indent=2, ensure_ascii=False) + "\n"
        (draft / PEFT_CONFIG_FILE).write_text(text, encoding="utf-8")
        card = model_card("peft", config, base_name=base_model_name, facts=facts)
        (draft / CARD_FILE).write_text(card, encoding="utf-8")
    return target


# ----------------------------------------------------------------------------------- the tensors


def _modules(
    path: TreePath, node: Modulation, config: SmoaConfig, name: ModuleName
) -> list[_Module]:
    """The adapted layers of one kernel; those left out have rank 0."""
    require(
        not isinstance(node, Bands) and node.weight_modulated == (config.modulation == "weight"),
        f"an adapter at {'/'.join(path)} of another kind than the config's",
        "params and config that belong together",
    )
    for leaf in (node.a, node.b):
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            raise ValueError(
                f"the adapter at {'/'.join(path)} is spread over several processes; expected all "
                "of it on this process's devices: export from a single process"
            )
    host = jax.tree.map(np.asarray, node)
    stacked = host.ranks.ndim == 2
    modules = []
    for layer in range(len(host.ranks)) if stacked else (None,):
        one = host if layer is None else jax.tree.map(lambda leaf, n=layer: leaf[n], host)
        if one.ranks.sum():
            a, b = unpadded_factors(one)
            scale = float(one.scale)
            module = _Module(
                path=path, layer=layer, name=name(path, layer), a=a.T, b=b, scale=scale
            )
            _check_scale(module, config)
            modules.append(module)
    return modules


def _check_scale(module: _Module, config: SmoaConfig) -> None:
    expected = config.scale(len(module.a))
    require(
        abs(module.scale - expected) <= 1e-6 * expected,
        f"an adapter of scale {module.scale:.6g} and rank {len(module.a)} for {module.name}, and a "
        f"config that gives {expected:.6g}",
        "params and config that belong together",
    )


def _tensors(kind: str, modules: list[_Module]) -> dict[str, np.ndarray]:
    tensors = {}
    largest = max(len(module.a) for module in modules)
    for module in modules:
        prefix = f"{PEFT_PREFIX}{module.name}"
        if kind == "lora":
            tensors[f"{prefix}.lora_A.weight"] = module.a
            tensors[f"{prefix}.lora_B.weight"] = module.b
        else:
            extra = (0, largest - len(module.a))
            tensors[f"{prefix}.hira_A"] = np.pad(module.a, (extra, (0, 0)))
            scaled = np.float32(module.scale) * module.b
            tensors[f"{prefix}.hira_B"] = np.pad(scaled, ((0, 0), extra))
    return {name: np.ascontiguousarray(value) for name, value in tensors.items()}


# ------------------------------------------------------------------------------------ the config


def _config_fields(
    kind: str, config: SmoaConfig, modules: list[_Module], targets: Mapping[str, Any]
) -> dict[str, Any]:
    ranks = collections.Counter(len(module.a) for module in modules)
    rank = max(ranks) if kind == "hira" else ranks.most_common(1)[0][0]
    fields = {
        "peft_type": kind.upper(),
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": rank,
        f"{kind}_dropout": config.dropout,
        "fan_in_fan_out": False,
        **targets,
    }
    if kind == "lora":
        patterns = _rank_patterns(modules, rank)
        fields["rank_pattern"] = patterns
        fields["bias"] = "none"
        fields["use_rslora"] = config.scaling == "alpha/sqrt(r)"
        fields["lora_alpha"] = _alpha(config, rank)
        fields["alpha_pattern"] = (
            {name: _alpha(config, value) for name, value in patterns.items()}
            if config.alpha is None
            else {}
        )
    return fields


def _alpha(config: SmoaConfig, rank: int) -> int | float:
    """PEFT's numerator; it divides by r or its root as we do."""
    alpha = rank if config.alpha is None else config.alpha
    return int(alpha) if float(alpha).is_integer() else float(alpha)


def _rank_patterns(modules: list[_Module], default: int) -> dict[str, int]:
    """Ranks other than the default: by last name where that says it all, else by whole names."""
    by_suffix: dict[str, set[int]] = collections.defaultdict(set)
    for module in modules:
        by_suffix[_last(module.name)].add(len(module.a))
    patterns = {}
    for module in modules:
        if len(module.a) != default:
            alike = len(by_suffix[_last(module.name)]) == 1
            pattern = _last(module.name) if alike else re.escape(module.name)
            patterns[pattern] = len(module.a)
    return patterns


def _targets(params: Params, modules: list[_Module], name: ModuleName) -> dict[str, Any]:
    """``target_modules``, by last names (and layers) where they match no other module.

    PEFT matches names by their ends, so ``q_proj`` alone would also adapt a ``q_proj`` that was
    left out here; whole names are exact, if long.
    """
    whole = {"target_modules": sorted(module.name for module in modules)}
    suffixes = {_last(module.name) for module in modules}
    adapted = {module.path for module in modules}
    others = {path[:-1] for path, leaf in walk(params) if not is_modulation(leaf)} - adapted
    try:
        if any(_last(name(path, 0)) in suffixes for path in others):
            return whole
    except (ValueError, KeyError):  # a module that the caller has no name for
        return whole
    layers: dict[TreePath, set[int | None]] = collections.defaultdict(set)
    for module in modules:
        layers[module.path].add(module.layer)
    first = next(iter(layers.values()))
    if any(chosen != first for chosen in layers.values()) or any(
        _peft_layer(module.name) != module.layer or is_part_of_more(module.name, module.layer)
        for module in modules
    ):
        return whole
    depth = max(len(node.ranks) for _, node, _ in find_modulations(params).values())
    fields: dict[str, Any] = {"target_modules": sorted(suffixes)}
    chosen = sorted(layer for layer in first if layer is not None)
    if chosen and len(chosen) < depth:
        fields["layers_to_transform"] = chosen
    return fields


def _last(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _peft_layer(name: str) -> int | None:
    """The layer that PEFT reads out of a module's name: the first number after two names."""
    match = re.match(r".*?\.[^.]*\.(\d+)\.", name)
    return int(match.group(1)) if match else None
