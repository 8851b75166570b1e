"""Rows of a data set on the Hugging Face hub, through its own library, ``datasets``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from smoa_jax.checks import how_to_install, require
from smoa_jax.data.config import HubConfig
from smoa_jax.data.rows import AnyRow, OnBadRow
from smoa_jax.data.sources import collect_rows


def open_split(config: HubConfig, split: str) -> Any:
    """One split as a ``datasets.Dataset``: on disk, any row at hand.

    Raises:
        ImportError: without the extra ``data``.
        ValueError: where it can't be had: no such name or split, no network and no copy of it.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"got data.hub.name={config.name} without the library datasets; expected the extra "
            f"'data'; {how_to_install('data')}"
        ) from error
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(
            config.name, config.subset or None, split=split, revision=config.revision or None
        )
    # The hub, the cache, the builders and the parsers each have errors of their own.
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"got data.hub.name={config.name}, split {split}, which cannot be had "
            f"({type(error).__name__}: {reason}); expected a data set of the hub, or a local "
            "directory in its layout; check name, subset and split, the network, and HF_TOKEN for "
            "a gated one; without a network, name files as data.train_files"
        ) from error


def read_hub(
    config: HubConfig,
    split: str,
    *,
    on_bad_row: OnBadRow = "error",
    limit: int = 0,
    columns: Mapping[str, str] | None = None,
) -> tuple[list[AnyRow], Counter[str]]:
    """Reads the rows of one split; arguments and errors as of ``read_rows``."""
    counts: Counter[str] = Counter(bad_rows=0)
    records = (
        (f"{config.name} {split} row {number}", record)
        for number, record in enumerate(open_split(config, split), start=1)
    )
    rows = collect_rows(records, counts, on_bad_row=on_bad_row, limit=limit, columns=columns)
    require(
        bool(rows),
        f"an empty split {split} ({counts['bad_rows']} bad rows)",
        "rows",
        "name another split, or map its fields by data.columns",
        where=config.name,
    )
    return rows, counts
