"""One or many safetensors files as one checkpoint, read slice by slice.

Opening checks every header against the size of its file (the library does), so a truncated
download is found before any weight is read. Each process reads only the slices that it asks for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from safetensors import SafetensorError, safe_open

from smoa_jax.checkpoint.assemble import Index, StoredTensor
from smoa_jax.checkpoint.errors import CheckpointError, listed, refuse, require

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_FLOATING = ("F64", "F32", "F16", "BF16")
_LFS_POINTER = b"version https://git-lfs"


class SafetensorsFiles:
    """The tensors of several files under one roof.

    Example:

        files = SafetensorsFiles("model", [Path("model/model.safetensors")])
        files.read("model.norm.weight", (slice(0, 16),))

    Args:
        source: what to call the whole in error messages.
        paths: the files; a tensor that two of them hold is an error.
    """

    def __init__(self, source: str, paths: Sequence[Path]):
        self.source = source
        self.tensors: dict[str, StoredTensor] = {}
        self._slices: dict[str, Any] = {}
        self._spans: dict[str, tuple[Path, int, int]] = {}
        for path in paths:
            self._open(path)

    def _open(self, path: Path) -> None:
        header, start = _read_header(path)
        try:
            handle = safe_open(str(path), framework="numpy")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(_broken(path, error)) from error
        for name in handle.keys():  # noqa: SIM118 (the handle is not a mapping)
            if name in self.tensors:
                refuse(f"{name} also in {self._spans[name][0].name}", "every name once", where=path)
            view = handle.get_slice(name)
            self.tensors[name] = StoredTensor(shape=tuple(view.get_shape()), dtype=view.get_dtype())
            self._slices[name] = view
            begin, end = header[name]["data_offsets"]
            self._spans[name] = (path, start + begin, start + end)

    def read(self, name: str, index: Index) -> np.ndarray:
        dtype = self.tensors[name].dtype
        require(
            dtype in _FLOATING,
            f"{name} stored as {dtype}",
            f"one of {', '.join(_FLOATING)}",
            "quantised safetensors can't be read",
            where=self.source,
        )
        return self._slices[name][index]

    def size(self, name: str) -> int:
        """Bytes of a tensor on disk."""
        _, begin, end = self._spans[name]
        return end - begin

    def ends(self, name: str, size: int) -> tuple[bytes, bytes]:
        path, begin, end = self._spans[name]
        with path.open("rb") as file:
            file.seek(begin)
            first = file.read(min(size, end - begin))
            file.seek(max(begin, end - size))
            last = file.read(end - max(begin, end - size))
        return first, last


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header and where the data begins."""
    try:
        with path.open("rb") as file:
            prefix = file.read(8)
            require(
                not _LFS_POINTER.startswith(prefix) or not prefix,
                "a Git LFS pointer, not the weights",
                "a safetensors file",
                "run `git lfs pull` where it was cloned",
                where=path,
            )
            size = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or size > path.stat().st_size:
                raise ValueError("its header is cut off")
            return json.loads(file.read(size)), 8 + size
    except CheckpointError:
        raise
    except (OSError, ValueError) as error:
        raise CheckpointError(_broken(path, error)) from error


def _broken(path: Path, error: Exception) -> str:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return (
        f"{path}: not a whole safetensors file ({reason}); expected an intact one: "
        "download or copy it again"
    )


def open_directory(directory: Path) -> SafetensorsFiles:
    """The safetensors of a Hugging Face directory, by its index when it has one."""
    index_path = directory / INDEX_FILE
    if index_path.is_file():
        return _open_indexed(directory, index_path)
    found = sorted(directory.glob("*.safetensors"))
    if (directory / SINGLE_FILE).is_file():
        found = [directory / SINGLE_FILE]
    require(
        len(found) <= 1,
        f"{len(found)} safetensors files ({listed(path.name for path in found)}) but no "
        f"{INDEX_FILE}",
        "the index beside them",
        "download it too",
        where=directory,
    )
    if not found:
        _refuse_nothing(directory)
    require(
        not found[0].name.startswith("adapter_"),
        f"only an adapter ({found[0].name})",
        "a whole model",
        "name the base model's directory",
        where=directory,
    )
    return SafetensorsFiles(str(directory), found)


def _refuse_nothing(directory: Path) -> NoReturn:
    """Say what lies in a directory without weights: pickles alone, or nothing of the kind."""
    suffixes = (".bin", ".pt", ".pth", ".ckpt")
    pickles = sorted(path.name for path in directory.iterdir() if path.suffix in suffixes)
    require(
        not pickles,
        f"only pickle files ({listed(pickles)}), which can run code when opened",
        "safetensors",
        "convert them with transformers' save_pretrained",
        where=directory,
    )
    refuse(
        "a directory without safetensors files",
        f"{SINGLE_FILE} or {INDEX_FILE} and its parts",
        where=directory,
    )


def _open_indexed(directory: Path, index_path: Path) -> SafetensorsFiles:
    weight_map = _read_weight_map(index_path)
    names = sorted(set(weight_map.values()))
    outside = [name for name in names if Path(name).name != name]
    require(
        not outside,
        f"an index that names {listed(outside)}",
        "files of its own directory",
        where=index_path,
    )
    absent = [name for name in names if not (directory / name).is_file()]
    require(
        not absent,
        f"an index that names {listed(absent)}, which {directory} doesn't hold",
        "every part",
        "download the missing ones",
        where=index_path,
    )
    files = SafetensorsFiles(str(directory), [directory / name for name in names])
    lost = [name for name in weight_map if name not in files.tensors]
    require(
        not lost,
        f"an index that places {listed(lost)} in files that don't hold it",
        "index and parts of one download",
        where=index_path,
    )
    return files


def _read_weight_map(index_path: Path) -> Mapping[str, str]:
    try:
        weight_map = json.loads(index_path.read_text(encoding="utf-8"))["weight_map"]
        if not all(isinstance(name, str) for name in weight_map.values()):
            raise TypeError("weight_map")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{index_path}: not a safetensors index; expected JSON with a weight_map from tensor "
            "to file: download it again"
        ) from error
    return weight_map
