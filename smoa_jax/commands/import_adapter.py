"""Make an adapter of one that PEFT wrote."""

from __future__ import annotations

from smoa_jax.adapter.tree import find_modulations
from smoa_jax.checkpoint.base import load_base
from smoa_jax.checkpoint.directories import check_target
from smoa_jax.checkpoint.names import layer_numbers
from smoa_jax.checkpoint.native import directory as adapter_files
from smoa_jax.checkpoint.native.directory import save_adapter
from smoa_jax.checkpoint.peft.load import import_peft
from smoa_jax.checkpoint.peft.names import module_naming
from smoa_jax.commands.tables import console
from smoa_jax.storage import located
from smoa_jax.training.model import resolve_dtype


def import_adapter(*, model: str, peft: str, output: str, overwrite: bool = False) -> int:
    """Make an adapter of one that PEFT wrote.

    Args:
        model: The base it was trained on: Hugging Face directory, GGUF file, or a name on the hub.
        peft: Directory of a LoRA or HiRA adapter, or organisation/adapter on the hub.
        output: Adapter directory to write; must not hold anything.
        overwrite: Replace the adapter that output holds.
    """
    check_target(
        located(output),
        marker=adapter_files.ADAPTER_FILE,
        what="an adapter",
        overwrite=overwrite,
        inputs=[model, peft],
    )
    base = load_base(model, resolve_dtype("auto"))
    params, config = import_peft(
        peft,
        base.params,
        hf_module_name=module_naming(base.hf_config),
        layer_numbers=layer_numbers(base.config),
    )
    save_adapter(
        params,
        config,
        output,
        base_fingerprint=base.fingerprint,
        base_name=model,
        overwrite=overwrite,
    )
    kind = "HiRA" if config.modulation == "weight" else "LoRA"
    kernels = len(find_modulations(params))
    console.print(
        f"{kind} of rank {config.rank} on {kernels} kernels; adapter: {output}",
        soft_wrap=True,
        markup=False,
    )
    return 0
