"""Files that grow while a run goes on: its metrics, and what trackers write.

Nothing can be appended to in a bucket. So they grow on this machine, and go up whole: at once after
what a resumed run needs, and otherwise in the background, once in a while.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import threading
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

from smoa_jax.storage import StorageError, download, explained, filesystem, is_remote

#: Seconds between two uploads that nobody waits for.
EVERY_S = 15.0


class GrowingFiles:
    """A directory to append in, which stands for one of a run.

    Args:
        home: Of the run. If it is on this machine, it is the directory itself.
        names: Of files and directories that an earlier process may have left in ``home``.
    """

    def __init__(self, home: Path, names: Sequence[str]):
        self._home = home
        self._sent: dict[Path, tuple[int, int]] = {}
        self._sending = threading.Lock()
        self._thread: threading.Thread | None = None
        self._last = time.monotonic()
        self.path = home
        if is_remote(home):
            self.path = Path(tempfile.mkdtemp(prefix="smoa-run-")) / home.name
            self.path.mkdir()
            with explained(home):
                for name in names:
                    if (home / name).exists():
                        download(home / name, self.path / name)
            self._sent = dict(self._states())

    def push(self) -> None:
        """Bring what has grown up to date; a bucket that fails gets a warning, and another try."""
        if not is_remote(self._home):
            return
        with self._sending:
            try:
                with explained(self._home):
                    files = filesystem(self._home)
                    for path, state in self._states().items():
                        if self._sent.get(path) != state:
                            name = path.relative_to(self.path).as_posix()
                            files.put_file(str(path), f"{self._home}/{name}")
                            self._sent[path] = state
            except StorageError as error:
                warnings.warn(f"{error}; metrics wait for the next upload", stacklevel=2)
            self._last = time.monotonic()

    def push_soon(self) -> None:
        """The same in the background, unless it was done a moment ago or is under way."""
        busy = self._thread is not None and self._thread.is_alive()
        if is_remote(self._home) and not busy and time.monotonic() - self._last >= EVERY_S:
            self._thread = threading.Thread(target=self.push, daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Bring everything up to date, and remove what is only a copy."""
        if is_remote(self._home):
            self.push()
            shutil.rmtree(self.path.parent, ignore_errors=True)

    def _states(self) -> dict[Path, tuple[int, int]]:
        states = {}
        for path in self.path.rglob("*"):
            with contextlib.suppress(FileNotFoundError):  # trackers tidy up after themselves
                if path.is_file() and not path.is_symlink():
                    stat = path.stat()
                    states[path] = (stat.st_mtime_ns, stat.st_size)
        return states
