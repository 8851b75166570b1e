"""Write a trained adapter for other tools."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
from rich.table import Table

from smoa_jax.adapter.merge import merge_report, merge_smoa
from smoa_jax.adapter.types import Params
from smoa_jax.checkpoint.directories import check_target
from smoa_jax.checkpoint.export import orbax as orbax_export
from smoa_jax.checkpoint.export.huggingface import export_huggingface
from smoa_jax.checkpoint.export.orbax import export_orbax
from smoa_jax.checkpoint.huggingface import directory as huggingface
from smoa_jax.checkpoint.huggingface.config import is_multimodal
from smoa_jax.checkpoint.native.directory import read_adapter
from smoa_jax.checkpoint.peft import export as peft_files
from smoa_jax.checkpoint.peft.export import export_peft
from smoa_jax.checkpoint.peft.names import module_naming
from smoa_jax.commands.tables import console, load
from smoa_jax.data.tokenizer import SpecialIds, load_tokenizer, special_ids


def export(
    *,
    model: str,
    adapter: str,
    output: str,
    format: Literal["huggingface", "orbax", "peft"] = "huggingface",
    dtype: Literal["float32", "bfloat16"] = "float32",
    max_shard_bytes: int = 5 * 2**30,
    overwrite: bool = False,
) -> int:
    """Write a trained adapter for other tools.

    Args:
        model: The base it was trained on: Hugging Face directory or GGUF file.
        adapter: Adapter directory.
        output: Directory to write; must not hold anything.
        format: huggingface, orbax: a merged model; peft: an adapter for PEFT.
        dtype: Of the merged weights; the merge itself is in float32.
        max_shard_bytes: Largest file of a merged Hugging Face model.
        overwrite: Replace what output holds.
    """
    marker, what = {
        "huggingface": (huggingface.CONFIG_FILE, "an exported model"),
        "orbax": (orbax_export.MARKER, "an exported Orbax checkpoint"),
        "peft": (peft_files.CONFIG_FILE, "a PEFT adapter"),
    }[format]
    check_target(
        Path(output), marker=marker, what=what, overwrite=overwrite, inputs=[model, adapter]
    )
    base, params = load(model, adapter, jnp.float32)
    if format == "peft":
        export_peft(
            params,
            read_adapter(adapter).config,
            output,
            base_model_name=str(Path(model)),
            hf_module_name=module_naming(base.hf_config),
            overwrite=overwrite,
        )
        console.print(f"PEFT adapter: {output}", soft_wrap=True, markup=False)
        return 0
    target = jnp.dtype(dtype)
    _show_rounding(params, dtype)
    write = functools.partial(
        export_huggingface,
        max_shard_bytes=max_shard_bytes,
        multimodal_source=base.source if is_multimodal(base.hf_config) else None,
    )
    if format == "orbax":
        write = export_orbax
    tokenizer = load_tokenizer(base.source)
    write(
        merge_smoa(params, target),
        base.config,
        output,
        dtype=target,
        hf_config=base.hf_config,
        generation_config=_with_stops(base.generation_config, special_ids(tokenizer)),
        tokenizer=tokenizer,
        overwrite=overwrite,
    )
    console.print(f"merged model: {output}", soft_wrap=True, markup=False)
    return 0


def _show_rounding(params: Params, dtype: str) -> None:
    """What rounding the merged kernels loses, with a warning where that is much of the update."""
    report = merge_report(params, jnp.dtype(dtype))
    table = Table(title=f"rounding of the merged kernels to {dtype}")
    for column in ("kernel", "rounding / update", "update that passes"):
        table.add_column(column, justify="left" if column == "kernel" else "right")
    for name, loss in report.items():
        table.add_row(name, f"{loss.relative:.2%}", f"{loss.kept:.2%}")
    console.print(table)
    worst = max(loss.relative for loss in report.values())
    if worst > 0.05:
        console.print(
            f"warning: rounding to {dtype} disturbs an update by {worst:.0%} of its size; "
            "--dtype float32 keeps it, or serve the adapter unmerged",
            style="yellow",
            soft_wrap=True,
        )


def _with_stops(generation_config: dict[str, Any], ids: SpecialIds) -> dict[str, Any]:
    """The source's own; if it names no EOS, which other tools would never stop at, with ours."""
    if generation_config.get("eos_token_id") is not None:
        return generation_config
    own = {"eos_token_id": list(ids.eos), "pad_token_id": ids.pad}
    if ids.bos >= 0:
        own["bos_token_id"] = ids.bos
    return {**own, **{key: value for key, value in generation_config.items() if value is not None}}
