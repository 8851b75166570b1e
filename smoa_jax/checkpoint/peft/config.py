"""What an ``adapter_config.json`` of PEFT says, as far as it decides what the adapter computes.

LoRA's scale is alpha / r or alpha / sqrt(r), with an alpha by module; HiRA, as of PEFT 0.21.2, has
none. Every other field is either known to change nothing once an adapter is trained, or must be
off: what makes the adapter another method than its name says is refused, not overlooked.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from smoa_jax.adapter.config import Scaling
from smoa_jax.checkpoint.errors import CheckpointError, listed, require
from smoa_jax.checkpoint.huggingface.config import read_json
from smoa_jax.checkpoint.peft.names import PEFT_CONFIG_FILE

#: What works for every adapter that can't be read here.
WAY_OUT = (
    "merge it in PEFT (merge_and_unload, then save_pretrained) and use the result as a base model"
)

# Fields that are read, or that say where, how and from what an adapter was trained.
_READ = {"peft_type", "lora_alpha", "alpha_pattern", "use_rslora", "lora_dropout", "hira_dropout"}
_HARMLESS = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision"),
    *("task_type", "runtime_config", "ensure_weight_tying", "eva_config"),
    # The tensors say which modules there are and of which ranks.
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("r", "rank_pattern"),
    # Without effect while the switch that they belong to is off.
    *("megatron_core", "qalora_group_size"),
}
# Ways of drawing the first A and B; the others also change the base.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_INITS = ("init_lora_weights", "init_weights")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeftSettings:
    """The settings of a LoRA or HiRA adapter."""

    kind: Literal["lora", "hira"]
    dropout: float
    alpha: float = 0.0  # of LoRA
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    scaling: Scaling = "alpha/r"

    def scale(self, module: str, rank: int) -> float:
        """s of a module, by its name in the model that PEFT wrapped."""
        if self.kind == "hira":
            return 1.0
        alpha = self.alpha
        for pattern, value in self.alpha_pattern.items():  # the first that the name's end matches
            if re.match(rf"(.*\.)?({pattern})$", module):
                alpha = value
                break
        return alpha / (rank if self.scaling == "alpha/r" else math.sqrt(rank))


def read_peft_config(directory: Path) -> PeftSettings:
    """The settings of the adapter in ``directory``.

    Raises:
        CheckpointError: if there is no config, or if it asks for anything else than plain LoRA or
            HiRA on linear layers.
    """
    path = directory / PEFT_CONFIG_FILE
    require(
        path.is_file(),
        f"a directory without {PEFT_CONFIG_FILE}",
        "a directory that PEFT's save_pretrained wrote",
        "name the one that holds the adapter itself",
        where=directory,
    )
    fields = read_json(path)
    kind = str(fields.get("peft_type")).lower()
    require(
        kind in ("lora", "hira"),
        f"an adapter of type {fields.get('peft_type')}",
        f"LORA or HIRA: {WAY_OUT}",
        where=path,
    )
    _check_off(path, fields)
    dropout = _number(path, fields, f"{kind}_dropout", 0.0)
    if kind == "hira":
        return PeftSettings(kind="hira", dropout=dropout)
    pattern = fields.get("alpha_pattern") or {}
    try:
        for regex in pattern:
            re.compile(regex)
    except (TypeError, re.error) as error:
        raise CheckpointError(
            f"{path}: alpha_pattern is {pattern!r} ({error}); expected regular expressions with "
            "the alpha of each: copy the file again"
        ) from error
    return PeftSettings(
        kind="lora",
        dropout=dropout,
        alpha=_number(path, fields, "lora_alpha", 8.0),
        alpha_pattern={key: _number(path, pattern, key) for key in pattern},
        scaling="alpha/sqrt(r)" if fields.get("use_rslora") else "alpha/r",
    )


def _check_off(path: Path, fields: Mapping[str, Any]) -> None:
    for name in _INITS:
        require(
            fields.get(name) in _PLAIN_INITS,
            f"{name}={fields.get(name)!r}, which changes the base weights too",
            "an adapter of the unchanged base: save it in PEFT with "
            f"path_initial_model_for_weight_conversion, or {WAY_OUT}",
            where=path,
        )
    unknown = set(fields) - _READ - _HARMLESS - set(_INITS)
    wanted = [name for name in sorted(unknown) if fields[name] and fields[name] != "none"]
    if wanted:
        got = listed(f"{name}={fields[name]!r}" for name in wanted)
        raise CheckpointError(
            f"{path}: got {got}; expected plain LoRA or HiRA on linear layers, without these: "
            f"{WAY_OUT}"
        )


def _number(path: Path, fields: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = fields.get(key, default)
    require(
        not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value),
        f"{key} {value!r}",
        "a number",
        where=path,
    )
    return float(value)
