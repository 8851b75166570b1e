"""A directory is replaced as a whole, whatever moment the process dies at."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from smoa_jax.checkpoint.directories import check_target, put_back, replaced_directory
from smoa_jax.checkpoint.errors import CheckpointError

ROOT = Path(__file__).parents[2]
#: Replaces ``target`` and is killed after so many renames.
KILLED = """
import os, signal, sys
from pathlib import Path
from smoa_jax.checkpoint import directories
from smoa_jax.checkpoint.directories import replaced_directory

target, renames = Path(sys.argv[1]), int(sys.argv[2])
original, done = Path.rename, 0
if renames >= 0:  # as on a file system that cannot exchange directories
    directories._exchange = lambda left, right: False

def rename(self, to):
    global done
    if done == renames:
        os.kill(os.getpid(), signal.SIGKILL)
    done += 1
    return original(self, to)

Path.rename = rename
directories.shutil.rmtree = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
with replaced_directory(target, marker="mark", what="a thing", overwrite=True) as draft:
    (draft / "mark").write_text("new")
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def target(tmp_path):
    (tmp_path / "thing").mkdir()
    (tmp_path / "thing" / "mark").write_text("old")
    return tmp_path / "thing"


def killed_after(target, renames):
    process = subprocess.run(
        [sys.executable, "-c", KILLED, str(target), str(renames)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize(("renames", "expected"), [(0, "old"), (1, "old"), (2, "new")])
def test_a_kill_at_any_rename_leaves_one_whole_directory_to_be_found(target, renames, expected):
    killed_after(target, renames)
    assert target.exists() == (renames != 1)
    put_back(target)
    assert (target / "mark").read_text() == expected
    put_back(target)
    assert (target / "mark").read_text() == expected


def test_where_directories_can_be_exchanged_there_is_no_moment_without_one(target):
    killed_after(target, -1)  # before what was replaced is removed
    assert (target / "mark").read_text() == "new"
    assert not list(target.parent.glob(".thing.old-*"))


def test_what_an_older_replacement_left_is_never_put_back_over_a_newer_one(target):
    killed_after(target, 2)
    assert len(list(target.parent.glob(".thing.old-*"))) == 1
    with replaced_directory(target, marker="mark", what="a thing", overwrite=True) as draft:
        (draft / "mark").write_text("newer")
    assert not list(target.parent.glob(".thing.old-*"))
    target.rename(target.parent / "moved")
    put_back(target)
    assert not target.exists()


def test_of_several_left_aside_none_is_guessed(tmp_path):
    for mark in ("1", "2"):
        (tmp_path / f".thing.old-{mark}").mkdir()
    put_back(tmp_path / "thing")
    assert not (tmp_path / "thing").exists()
    odd = tmp_path / ".run[1].old-3"
    odd.mkdir()
    put_back(tmp_path / "run[1]")
    assert (tmp_path / "run[1]").exists()


def test_whoever_writes_next_finds_it_occupied_and_may_replace_it(target):
    killed_after(target, 1)
    with pytest.raises(CheckpointError, match="already exists"):
        check_target(target, marker="mark", what="a thing", overwrite=False)
    with replaced_directory(target, marker="mark", what="a thing", overwrite=True) as draft:
        (draft / "mark").write_text("newer")
    assert (target / "mark").read_text() == "newer"
    assert not list(target.parent.glob(".thing.old-*"))


def test_what_lies_beside_another_name_is_left_alone(tmp_path):
    aside = tmp_path / ".other.old-1234"
    aside.mkdir()
    put_back(tmp_path / "thing")
    assert aside.exists()
    assert not (tmp_path / "thing").exists()


def test_files_can_be_read_by_whom_umask_lets(tmp_path):
    """Some libraries write files that their owner alone may read."""
    before = os.umask(0o027)
    try:
        with replaced_directory(tmp_path / "out", marker="a", what="it", overwrite=False) as draft:
            for name in ("a", "deep/b"):
                (draft / name).parent.mkdir(exist_ok=True)
                (draft / name).touch(mode=0o600)
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "out").rglob("[ab]")}
    assert modes == {0o640}
