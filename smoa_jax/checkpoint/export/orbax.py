"""A plain params tree as an Orbax checkpoint that any JAX program opens, without this project.

    DIR/params/                    an Orbax checkpoint: nested dicts of arrays, as in the tree
    DIR/config.json, generation_config.json, tokenizer files    as Hugging Face has them

To read it, with nothing but Orbax, whole or each array straight to its shards:

    restored = ocp.StandardCheckpointer().restore("/absolute/DIR/params")
    restored = ocp.StandardCheckpointer().restore("/absolute/DIR/params", abstract_tree)

where ``abstract_tree`` holds ``jax.ShapeDtypeStruct(shape, dtype, sharding=...)``; the shapes are
those of the metadata, ``.metadata(DIR / "params").item_metadata``. What is sharded is written shard
by shard. Everything goes into a sibling directory first and is renamed at the end: the target holds
a whole model or none, whenever the process is killed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.typing import DTypeLike
from orbax.checkpoint._src.serialization.types import (  # Orbax shows no public name for these
    DefaultSerializationStatusCallback,
    TransferPriority,
)

from smoa_jax.checkpoint.directories import replaced_directory
from smoa_jax.checkpoint.export.model_files import TokenizerWriter, check_params, plan_files
from smoa_jax.checkpoint.huggingface.config import text_fields
from smoa_jax.models.config import DecoderConfig
from smoa_jax.storage import located

#: The Orbax checkpoint inside an exported directory.
PARAMS_DIRECTORY = "params"

#: A file that Orbax writes into every checkpoint, by which an exported directory is known.
MARKER = f"{PARAMS_DIRECTORY}/_METADATA"
_HOST_GIGABYTES = 1


def export_orbax(
    params: Mapping[str, Any],
    config: DecoderConfig,
    directory: str | Path,
    *,
    dtype: DTypeLike,
    hf_config: Mapping[str, Any] | None = None,
    generation_config: Mapping[str, Any] | None = None,
    tokenizer: TokenizerWriter | None = None,
    tokenizer_files: Sequence[str | Path] = (),
    overwrite: bool = False,
) -> Path:
    """Write a model as an Orbax checkpoint with its configs and tokenizer beside it.

    >>> export_orbax(merge_smoa(params), base.config, "merged", dtype=jnp.float32,
    ...              hf_config=base.hf_config, tokenizer=tokenizer)

    Host memory: 1 GiB of arrays on their way to disk, or one (stacked) array if that is larger.

    Args:
        params: A plain tree, no adapter in it; on one process's devices, sharded or not.
        config: Its decoder.
        directory: To be made; refused if it holds anything, unless ``overwrite``.
        dtype: Of the weights on disk, float32 or bfloat16.
        hf_config: The source's own ``config.json``, kept whole except for the dtype; of a
            multimodal model, the part that describes the decoder.
        generation_config: The source's own; None writes the token ids of ``hf_config``.
        tokenizer: An object with ``save_pretrained``, or a function of the directory.
        tokenizer_files: Files to copy beside the weights.
        overwrite: Replace an exported checkpoint; any other occupied directory is refused still.

    Returns:
        The directory.

    Raises:
        ValueError: for params that aren't those of ``config``, or a bad argument.
        CheckpointError: if the directory is occupied.
    """
    target = located(directory)
    files = plan_files(
        config,
        dtype,
        hf_config=None if hf_config is None else text_fields(hf_config),
        generation_config=generation_config,
        tokenizer=tokenizer,
        tokenizer_files=tokenizer_files,
        reserved=(PARAMS_DIRECTORY,),
    )
    check_params(params, config)
    with replaced_directory(
        target, marker=MARKER, what="an exported Orbax checkpoint", overwrite=overwrite
    ) as draft:
        _write_params(dict(params), draft / PARAMS_DIRECTORY, jnp.dtype(dtype))
        files.write(draft)
    return target


class _InBatches(DefaultSerializationStatusCallback):
    """Makes Orbax heed its limit on host memory, which by default exempts every array."""

    def key_priority(self, _: Any) -> TransferPriority:
        return TransferPriority.ASYNCHRONOUS_DEPRIORITIZED


def _write_params(params: dict[str, Any], directory: Path, dtype: Any) -> None:
    """Write the checkpoint, rounded to ``dtype`` on the way, in batches of limited size."""
    arrays_handler = ocp.type_handlers.ArrayHandler(callback=_InBatches())
    handler = ocp.PyTreeCheckpointHandler(
        save_device_host_concurrent_gb=_HOST_GIGABYTES,
        type_handler_registry=ocp.type_handlers.create_type_handler_registry(
            (jax.Array, arrays_handler)
        ),
    )
    arrays = jax.tree.map(jnp.asarray, params)
    arguments = jax.tree.map(lambda _: ocp.SaveArgs(dtype=dtype), arrays)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(directory, ocp.args.PyTreeSave(arrays, save_args=arguments))
