"""Write a trained adapter for other tools."""

from __future__ import annotations

import functools
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from rich.table import Table

from smoa_jax.adapter.merge import MergeLoss
from smoa_jax.checkpoint.assemble import assemble
from smoa_jax.checkpoint.base import StoredBase, open_base
from smoa_jax.checkpoint.card import CARD_FILE, model_card
from smoa_jax.checkpoint.directories import check_target
from smoa_jax.checkpoint.export import orbax as orbax_export
from smoa_jax.checkpoint.export.huggingface import export_stored
from smoa_jax.checkpoint.export.merged import MergedReader
from smoa_jax.checkpoint.export.orbax import export_orbax
from smoa_jax.checkpoint.huggingface import directory as huggingface
from smoa_jax.checkpoint.huggingface.config import is_multimodal
from smoa_jax.checkpoint.native.directory import open_adapter, read_adapter
from smoa_jax.checkpoint.peft import export as peft_files
from smoa_jax.checkpoint.peft.export import export_peft
from smoa_jax.checkpoint.peft.names import module_naming
from smoa_jax.commands.tables import console
from smoa_jax.data.tokenizer import SpecialIds, load_tokenizer, special_ids
from smoa_jax.storage import is_remote, located
from smoa_jax.training.model import spectra_cache
from smoa_jax.training.saved_adapter import adapter_directory

#: Of the size of a kernel's update: what rounding a merged model may disturb unasked.
LARGEST_ROUNDING = 0.05


def export(
    *,
    model: str,
    adapter: str,
    output: str,
    checkpoint: str = "",
    format: Literal["huggingface", "orbax", "peft"] = "huggingface",
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    base_name: str = "",
    max_shard_bytes: int = 5 * 2**30,
    spectra_cache_dir: str = "auto",
    overwrite: bool = False,
) -> int:
    """Write a trained adapter for other tools, on the host.

    Kernel by kernel, but for orbax, which holds the merged model once.

    Args:
        model: The base it was trained on: Hugging Face directory, GGUF file, or a name on the hub.
        adapter: Adapter directory, or a run's.
        output: Directory to write; must not hold anything.
        checkpoint: best, last or a step's number, of the run that adapter names or lies in; empty:
            the adapter as it stands.
        format: huggingface, orbax: a merged model; peft: an adapter for PEFT.
        dtype: Of the merged weights; the merge itself is in float32. auto: bfloat16 if the base is
            stored in it and rounding loses at most 5 % of any kernel's update, else float32.
        base_name: What a PEFT adapter calls its base, such as its name on the hub; empty: model.
        max_shard_bytes: Largest file of a merged Hugging Face model.
        spectra_cache_dir: Where spectral bands are kept: auto, off or a directory.
        overwrite: Replace what output holds.
    """
    marker, what = {
        "huggingface": (huggingface.CONFIG_FILE, "an exported model"),
        "orbax": (orbax_export.MARKER, "an exported Orbax checkpoint"),
        "peft": (peft_files.PEFT_CONFIG_FILE, "a PEFT adapter"),
    }[format]
    check_target(
        located(output), marker=marker, what=what, overwrite=overwrite, inputs=[model, adapter]
    )
    base = open_base(model)
    with adapter_directory(adapter, checkpoint, model) as directory:
        params, config = open_adapter(directory, base.params, base_fingerprint=base.fingerprint)
        facts = read_adapter(directory).said
    if format == "peft":
        export_peft(
            params,
            config,
            output,
            base_model_name=base_name or _name_of(model),
            hf_module_name=module_naming(base.hf_config),
            facts=facts,
            overwrite=overwrite,
        )
        console.print(f"PEFT adapter: {output}", soft_wrap=True, markup=False)
        return 0

    merged = functools.partial(
        MergedReader, base, params, config, cache_dir=spectra_cache(spectra_cache_dir)
    )
    chosen, losses = _chosen(base, merged()) if dtype == "auto" else (dtype, {})
    count = sum(math.prod(slot.shape) for slot in base.slots.values())
    size = count * jnp.dtype(chosen).itemsize / 2**30
    console.print(f"writing {count:,} parameters in {chosen}, {size:.2f} GiB", soft_wrap=True)
    counts = chosen != "float32" and not losses
    reader = merged(rounded_to=chosen if counts else None)
    write = _write_huggingface if format == "huggingface" else _write_orbax
    with tempfile.TemporaryDirectory() as folder:
        card = Path(folder) / CARD_FILE
        text = model_card(format, config, base_name=base_name or _name_of(model), facts=facts)
        card.write_text(text, encoding="utf-8")
        beside = _beside_weights(base) | {"tokenizer_files": [card]}
        write(reader, base, output, jnp.dtype(chosen), max_shard_bytes, overwrite, beside)
    _show_rounding(losses or reader.report(), chosen)
    console.print(f"merged model: {output}", soft_wrap=True, markup=False)
    return 0


def _name_of(model: str) -> str:
    """What a card calls a base that was given by its place."""
    return model if is_remote(model) else str(Path(model))


def _chosen(base: StoredBase, reader: MergedReader) -> tuple[str, Mapping[str, MergeLoss]]:
    """The base's own dtype, unless rounding to it would lose more than a little of an update.

    With what it loses, so that this need not be measured again. Every update is formed here and
    once more for writing: to keep them in between would take room for all adapted kernels.
    """
    stored = {tensor.dtype for tensor in base.reader.tensors.values()}
    if stored != {"BF16"}:
        return "float32", {}
    losses = reader.measure("bfloat16")
    worst, name = max((loss.relative, kernel) for kernel, loss in losses.items())
    if worst <= LARGEST_ROUNDING:
        return "bfloat16", losses
    console.print(
        f"dtype float32: rounding to the base's bfloat16 would disturb the update of {name} by "
        f"{worst:.0%} of its size, and {LARGEST_ROUNDING:.0%} is allowed; --dtype bfloat16 does so",
        soft_wrap=True,
        markup=False,
    )
    return "float32", {}


def _write_huggingface(
    reader: MergedReader,
    base: StoredBase,
    output: str,
    dtype: Any,
    max_shard_bytes: int,
    overwrite: bool,
    beside: dict[str, Any],
) -> None:
    export_stored(
        reader,
        base.slots,
        base.config,
        output,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        multimodal_source=base.source if is_multimodal(base.hf_config) else None,
        overwrite=overwrite,
        **beside,
    )


def _write_orbax(
    reader: MergedReader,
    base: StoredBase,
    output: str,
    dtype: Any,
    _: int,
    overwrite: bool,
    beside: dict[str, Any],
) -> None:
    """Orbax writes whole arrays, so the merged model is put together once, on the host."""
    rounded = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), base.params)
    with jax.default_device(jax.devices("cpu")[0]):
        merged = assemble(reader, rounded, base.slots, None)
        export_orbax(
            merged,
            base.config,
            output,
            dtype=dtype,
            overwrite=overwrite,
            **beside,
        )


def _beside_weights(base: StoredBase) -> dict[str, Any]:
    """Configs and tokenizer of an exported model."""
    tokenizer = load_tokenizer(base.source)
    return {
        "hf_config": base.hf_config,
        "generation_config": _with_stops(base.generation_config, special_ids(tokenizer)),
        "tokenizer": tokenizer,
    }


def _show_rounding(report: Mapping[str, MergeLoss], dtype: str) -> None:
    """What rounding the merged kernels loses, with a warning where that is much of the update.

    The merge itself is in float32, of which nothing is reported, since nothing is rounded.
    """
    worst = max((loss.relative for loss in report.values()), default=0.0)
    if not worst:
        console.print(f"rounding: none, the merged kernels are what {dtype} holds", soft_wrap=True)
        return
    table = Table(title=f"rounding of the merged kernels to {dtype}")
    for column in ("kernel", "rounding / update", "update that passes"):
        table.add_column(column, justify="left" if column == "kernel" else "right")
    for name, loss in report.items():
        table.add_row(name, f"{loss.relative:.2%}", f"{loss.kept:.2%}")
    console.print(table)
    if worst > LARGEST_ROUNDING:
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
