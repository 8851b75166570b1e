"""Put an adapter or an export on the Hugging Face hub, as it lies on disk."""

from __future__ import annotations

from pathlib import Path

from smoa_jax.checkpoint.errors import CheckpointError, require
from smoa_jax.checkpoint.huggingface.directory import CONFIG_FILE, first_line, is_hub_name
from smoa_jax.checkpoint.native.directory import ADAPTER_FILE
from smoa_jax.checkpoint.peft.names import PEFT_CONFIG_FILE

#: A file of each kind of directory that this project writes for others, and what it then is.
_KINDS = {
    ADAPTER_FILE: "an adapter",
    PEFT_CONFIG_FILE: "an adapter for PEFT",
    CONFIG_FILE: "a merged model",
}


def check_upload(directory: str | Path, name: str) -> str:
    """What a directory is, such as ``"an adapter"``; nothing is asked of the hub.

    Raises:
        CheckpointError: for another directory or name, or without a token.
    """
    directory = Path(directory).expanduser()
    kinds = [what for file, what in _KINDS.items() if (directory / file).is_file()]
    require(
        bool(kinds),
        "a directory that is no adapter and no export",
        f"one with {', '.join(_KINDS)}",
        "name runs/NAME/adapter, or what smoa export wrote",
        where=directory,
    )
    require(
        is_hub_name(name),
        f"the name {name!r}",
        "organisation/name, as the hub has it",
        "begin it with your account's name",
    )
    from huggingface_hub import get_token

    require(
        get_token() is not None,
        "no token of the hub",
        "an account that may write",
        "run `hf auth login`, or set HF_TOKEN",
    )
    return kinds[0]


def upload(directory: str | Path, name: str, *, private: bool = True, message: str = "") -> str:
    """Uploads every file of a directory, into a repository that is made if there is none.

    Args:
        directory: An adapter's, or one that an export wrote.
        name: ``organisation/name`` on the hub.
        private: Of a repository that is made; one that exists stays as it is.
        message: Of the commit; empty: says what was uploaded.

    Returns:
        Where it can be looked at.

    Raises:
        CheckpointError: as ``check_upload``; without the right to write, or a connection.
    """
    what = check_upload(directory, name)
    directory = Path(directory).expanduser()
    from huggingface_hub import HfApi, errors

    api = HfApi()
    try:
        api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=name,
            folder_path=directory,
            commit_message=message or f"Upload {what} made with smoa_jax",
        )
    except errors.HfHubHTTPError as error:
        raise CheckpointError(
            f"got {name}, which the hub does not take ({first_line(error)}); expected a repository "
            "that your token may write to; check the name, or make a token with the role write"
        ) from error
    except Exception as error:  # proxies, sockets and the storage layer each raise their own
        raise CheckpointError(
            f"got no connection to the hub ({first_line(error)}); expected one; nothing is lost: "
            "run it again when there is one, files that have arrived are not sent twice"
        ) from error
    return f"https://huggingface.co/{name}"
