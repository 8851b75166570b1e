"""Where a name points: a path on this machine, or one in a bucket (``gs://``, ``s3://``).

Code that reads and writes whole files is the same for both: ``located`` gives a path with pathlib's
methods. What a bucket has not, nobody assumes there: no renaming of directories, no appending, no
locks, no directory without a file in it. A directory in a bucket is whole when the file that marks
its kind is there, since that one goes up last.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import os
import shutil
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

from smoa_jax.checks import how_to_install, refuse, require

#: What opens the buckets of a scheme: the library, which is also the name of the extra's reason.
_LIBRARIES = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}
#: Seconds after which a bucket that doesn't answer counts as one that can't be reached.
PATIENCE_S = 60.0


class StorageError(ValueError):
    """A bucket that cannot be used, in one line for people."""


def is_remote(name: object) -> bool:
    """Whether a name or a path is of a bucket."""
    return "://" in str(name)


def located(name: str | os.PathLike[str]) -> Path:
    """The path that a name means, with pathlib's methods wherever it lies.

    A bucket is tried when it is first named, so that one that can't be reached is told at once.

    Raises:
        StorageError: for a scheme that is not known, or a bucket that cannot be reached.
        ImportError: if the library for its buckets is not installed.
    """
    if not is_remote(name):
        return name if isinstance(name, Path) else Path(name).expanduser()
    scheme, _, rest = str(name).partition("://")
    require(
        scheme in _LIBRARIES and rest.partition("/")[0] != "",
        f"{name}",
        f"a path, or {' or '.join(f'{known}://BUCKET/...' for known in _LIBRARIES)}",
        "correct it",
        error=StorageError,
    )
    _reach(scheme, rest.partition("/")[0])
    path: Any = name if isinstance(name, PurePath) else _epath().Path(name)
    return path


def _epath() -> Any:
    from etils import epath

    return epath


@functools.cache
def _reach(scheme: str, bucket: str) -> None:
    """Make sure once that a bucket's server answers; whether the bucket is there shows in use."""
    library, extra = _LIBRARIES[scheme]
    # Buckets with real folders are looked for by another API, with a warning a call without it.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    try:
        __import__(library)
    except ImportError as error:
        raise ImportError(
            f"got {scheme}://{bucket} without the library {library}; expected the extra "
            f"'{extra}'; {how_to_install(extra)}, or name a directory of this machine"
        ) from error
    failed: list[Exception] = []

    def ask() -> None:
        try:
            files = filesystem(f"{scheme}://{bucket}")
            files.exists(f"{bucket}/.smoa")
        except Exception as error:  # each library has its own dozen
            failed.append(error)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(PATIENCE_S)
    if asking.is_alive():
        failed.append(TimeoutError(f"no answer in {PATIENCE_S:.0f} s"))
    if failed:
        refuse(
            f"{scheme}://{bucket}, which cannot be reached ({reason(failed[0])})",
            "a bucket that this machine may use",
            "check its name, the credentials and the network",
            error=StorageError,
        )


def filesystem(path: object) -> Any:
    """The fsspec file system of a bucket; what others write there is seen at once."""
    files = _epath().backend.fsspec_backend.fs(str(path))
    files.dircache.use_listings_cache = False
    return files


def reason(error: BaseException) -> str:
    """What went wrong, in a few words on one line."""
    text = " ".join(str(error).split())
    return text[:300] if text else type(error).__name__


@contextlib.contextmanager
def explained(path: object) -> Iterator[None]:
    """Says in one line what a bucket's library raises; paths of this machine are left alone.

    Raises:
        StorageError: naming ``path``.
    """
    if not is_remote(path):
        yield
        return
    try:
        yield
    except StorageError:
        raise
    except Exception as error:  # each library has its own dozen
        raise StorageError(
            f"got {path}, which cannot be used ({reason(error)}); expected a bucket that is there "
            "and may be read and written; check its name and the credentials"
        ) from error


def check_writable(directory: Path) -> None:
    """Refuse a directory that can't be written to, be it here or in a bucket; leaves nothing.

    Raises:
        StorageError: in one line.
    """
    if is_remote(directory):
        probe = directory / f".probe-{uuid.uuid4().hex[:8]}"
        with explained(directory):
            probe.write_text("")
            probe.unlink()
        return
    there = directory.absolute()
    while not there.exists():
        there = there.parent
    try:
        with tempfile.NamedTemporaryFile(dir=there, prefix=".probe-"):
            pass
    except OSError as error:
        raise StorageError(
            f"got {directory}, which cannot be written ({reason(error)}); expected a directory "
            "that can; choose another"
        ) from error


def remove_tree(path: Path) -> None:
    """Delete a file or a directory with all that is in it; nothing there is fine."""
    if is_remote(path):
        with contextlib.suppress(FileNotFoundError):
            filesystem(path).rm(str(path), recursive=True)
    elif path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def upload(source: Path, target: Path, *, last: str = "") -> None:
    """Put the files of a directory into a bucket.

    Args:
        source: On this machine.
        target: In a bucket; files that are there and not in ``source`` stay.
        last: The file whose presence says that all the others are there.
    """
    files = filesystem(target)
    names = [path for path in sorted(source.rglob("*")) if path.is_file()]
    for path in sorted(names, key=lambda path: path == source / last):
        files.put_file(str(path), f"{target}/{path.relative_to(source).as_posix()}")


def download(source: Path, target: Path) -> None:
    """Get a file or all files below a directory of a bucket; ``target`` is made."""
    files = filesystem(source)
    root = str(files._strip_protocol(str(source)))
    found = files.find(root)
    require(
        bool(found),
        "no such file or directory",
        "one that is there",
        "correct the name",
        where=source,
        error=StorageError,
    )
    for name in found:
        place = target / name[len(root) :].lstrip("/") if name != root else target
        place.parent.mkdir(parents=True, exist_ok=True)
        files.get_file(name, str(place))


def local_copy(name: str | os.PathLike[str]) -> Path:
    """A file or directory that this machine can read at any place: itself, or a copy of a bucket's.

    Copies are kept in the user's cache directory, by what the bucket says of the content: what has
    changed there is fetched again. Names are kept.

    Raises:
        StorageError: if there is no such thing in the bucket.
    """
    path = located(name)
    if not is_remote(path):
        return path
    files = filesystem(path)
    with explained(path):
        found = sorted(files.find(str(path), detail=True).items())
    require(
        bool(found),
        "no such file or directory",
        "one that is there",
        "correct the name",
        where=path,
        error=StorageError,
    )
    digest = hashlib.sha256()
    for key, entry in found:
        content = [entry.get(field) for field in ("size", "ETag", "generation", "md5Hash", "mtime")]
        digest.update(repr((key, content)).encode())
    place = (cache_dir() or _temporary()) / "files" / digest.hexdigest()[:40] / path.name
    if not place.exists():
        draft = place.parent.with_name(f".{uuid.uuid4().hex[:8]}.draft")
        try:
            with explained(path):
                download(path, draft / path.name)
            place.parent.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(OSError):  # another process may have been faster
                draft.rename(place.parent)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return place


def cache_dir() -> Path | None:
    """The user's own cache directory, or None where it is switched off.

    ``SMOA_JAX_CACHE`` names another, or says ``off``; else it is ``smoa_jax/`` in
    ``XDG_CACHE_HOME`` or in the system's usual place. It is always on this machine.
    """
    named = os.environ.get("SMOA_JAX_CACHE", "")
    if named in ("off", "0"):
        return None
    if named and not is_remote(named):
        return Path(named).expanduser()
    usual = "~/Library/Caches" if sys.platform == "darwin" else "~/.cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or usual).expanduser() / "smoa_jax"


@functools.cache
def _temporary() -> Path:
    """A directory of this process alone, for as long as it lives."""
    path = tempfile.mkdtemp(prefix="smoa-")
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return Path(path)
