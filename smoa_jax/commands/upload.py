"""Put an adapter or an export on the Hugging Face hub."""

from __future__ import annotations

from smoa_jax.checkpoint.huggingface.upload import check_upload
from smoa_jax.checkpoint.huggingface.upload import upload as upload_directory
from smoa_jax.commands.tables import console
from smoa_jax.storage import local_copy
from smoa_jax.training.directory import RunDirectory


def upload(*, directory: str, name: str, public: bool = False, message: str = "") -> int:
    """Put an adapter or an export on the Hugging Face hub.

    Args:
        directory: Of an adapter, of a run (its adapter is meant), or what smoa export wrote.
        name: organisation/name of the repository, which is made if there is none.
        public: Let everybody see a repository that is made.
        message: Of the commit; empty: says what was uploaded.
    """
    run = RunDirectory(directory)
    source = local_copy(run.adapter if run.holds_run else directory)
    check_upload(source, name)
    size = sum(file.stat().st_size for file in source.rglob("*") if file.is_file())
    console.print(f"uploading {source} ({size / 1e6:.1f} MB)", soft_wrap=True, markup=False)
    where = upload_directory(source, name, private=not public, message=message)
    console.print(where, soft_wrap=True, markup=False)
    return 0
