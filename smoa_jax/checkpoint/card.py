"""What lies beside an adapter or an export for people: a README in the form of a model card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import yaml

from smoa_jax.adapter.config import SmoaConfig
from smoa_jax.checkpoint.huggingface.directory import is_hub_name

#: Name of the file.
CARD_FILE = "README.md"

_METHODS = {
    ("none", "none"): "LoRA (arXiv 2106.09685)",
    ("none", "contiguous_blocks"): "MELoRA (arXiv 2402.17263)",
    ("weight", "none"): "HiRA (ICLR 2025)",
    ("weight", "spectral_blocks"): "SMoA, spectral blocks (arXiv 2605.21147)",
    ("weight", "aligned_blocks"): "SMoA, aligned blocks (after arXiv 2605.21147)",
    ("weight", "spectral_bands"): "SMoA, spectral bands (arXiv 2601.07507)",
}

_USES = {
    "adapter": """
Answer with it, or write it for other tools:

    smoa generate --model {base} --adapter DIRECTORY --prompt "..."
    smoa export --model {base} --adapter DIRECTORY --output merged          # transformers
    smoa export --model {base} --adapter DIRECTORY --output peft --format peft

In Python:

    import smoa_jax
    base = smoa_jax.load_base("{base}")
    params = smoa_jax.load_adapter("DIRECTORY", base.params, base_fingerprint=base.fingerprint)
""",
    "huggingface": """
A merged model, as any other:

    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained("DIRECTORY")
    tokenizer = AutoTokenizer.from_pretrained("DIRECTORY")
""",
    "orbax": """
A merged model for JAX programs; nothing but Orbax is needed:

    import orbax.checkpoint as ocp
    params = ocp.StandardCheckpointer().restore("/absolute/DIRECTORY/params")
""",
    "peft": """
An adapter for PEFT. It gives what the original gives; trained on here it would not stay one of its
kind, since PEFT knows no blocks:

    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained("{base}")
    model = PeftModel.from_pretrained(model, "DIRECTORY")
""",
}


def model_card(
    kind: str, config: SmoaConfig, *, base_name: str, facts: Mapping[str, object] | None = None
) -> str:
    """The README of an adapter or an export.

    Args:
        kind: ``adapter``, ``huggingface``, ``orbax`` or ``peft``.
        config: Of the adapter.
        base_name: Of the base: a name on the hub or a path.
        facts: What else there is to say, by name: data, settings, losses.
    """
    header: dict[str, object] = {"tags": ["smoa", "jax", kind]}
    if is_hub_name(base_name) and not Path(base_name).exists():
        header["base_model"] = base_name
        at = base_name
    else:  # where it lies on this machine is nobody else's business
        base_name = Path(base_name).name
        at = "BASE"
    if kind == "peft":
        header["library_name"] = "peft"
    elif kind == "huggingface":
        header["library_name"] = "transformers"
    rows = {"base": base_name, "method": method_name(config), **_settings(config), **(facts or {})}
    table = "\n".join(f"| {name} | {_cell(value)} |" for name, value in rows.items())
    name = Path(base_name).name
    return (
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n\n# {name}, adapted\n\n"
        f"| | |\n|---|---|\n{table}\n\n## How to use it\n{_USES[kind].format(base=at)}\n"
        "Made with smoa_jax.\n"
    )


def method_name(config: SmoaConfig) -> str:
    """The adapter's method as papers call it, or what of the family it is."""
    known = _METHODS.get((config.modulation, config.partition))
    return known or f"{config.partition}, modulation {config.modulation}"


def _settings(config: SmoaConfig) -> dict[str, object]:
    settings: dict[str, object] = {"rank": config.rank}
    if config.num_subspaces > 1:
        settings["subspaces"] = config.num_subspaces
    targets = config.target_modules
    settings["targets"] = targets if isinstance(targets, str) else ", ".join(targets)
    if config.layers:
        settings["layers"] = ", ".join(map(str, config.layers))
    if config.dropout:
        settings["dropout"] = config.dropout
    return settings


def _cell(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
