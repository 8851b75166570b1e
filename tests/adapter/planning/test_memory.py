"""As many decompositions at a time as this process has CPUs and memory for."""

from __future__ import annotations

import os

import pytest

from smoa_jax.adapter.planning.memory import available_memory, decomposition_bytes
from smoa_jax.adapter.planning.spectra import num_workers

MIB = 1 << 20


@pytest.mark.parametrize(
    ("cpus", "memory", "expected"),
    [
        (4, 100 * decomposition_bytes(60, 40), 4),
        (4, 3 * decomposition_bytes(60, 40) + 1, 3),
        (4, decomposition_bytes(60, 40) - 1, 1),
        (4, 0, 1),
    ],
)
def test_workers_are_capped_by_the_largest_layer_and_never_none(cpus, memory, expected):
    assert num_workers([(8, 9), (60, 40), (30, 30)], cpus=cpus, memory=memory) == expected


def test_only_the_cpus_of_this_process_count(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 5, 7}, raising=False)
    assert num_workers([(8, 8)], memory=1 << 40) == 3


def test_bands_are_charged_for_the_parts_that_are_formed():
    memory = 3 * decomposition_bytes(60, 40)
    assert num_workers([(60, 40)], cpus=8, memory=memory) == 3
    assert num_workers([(60, 40)], cpus=8, memory=memory, num_bands=4) == 1
    # Measured peaks, in units of the float32 weight: 4.8 for scores, 12.4 for four bands.
    unit = 4 * 768 * 3072
    assert 4.8 < decomposition_bytes(768, 3072) / unit < 6
    assert 12.4 < decomposition_bytes(768, 3072, 4) / unit < 14


def test_a_decomposition_is_charged_for_its_smaller_gram_matrix():
    assert decomposition_bytes(3, 7) == decomposition_bytes(7, 3) == 4 * (4 * 21 + 5 * 9)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 1 << 62),
        ({"proc/meminfo": "MemTotal: 9 kB\nMemAvailable: 2048 kB\n"}, 2 * MIB),
        (
            {
                "proc/meminfo": "MemAvailable: 8192 kB\n",
                "sys/fs/cgroup/memory.max": f"{5 * MIB}\n",
                "sys/fs/cgroup/memory.current": f"{4 * MIB}\n",
            },
            MIB,
        ),
        (
            {
                "proc/meminfo": "MemAvailable: 1024 kB\n",
                "sys/fs/cgroup/memory.max": "max\n",
                "sys/fs/cgroup/memory.current": "5\n",
            },
            MIB,
        ),
        (
            {
                "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{3 * MIB}",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{4 * MIB}",
            },
            0,
        ),
    ],
)
def test_memory_is_the_least_that_machine_and_control_group_leave(tmp_path, files, expected):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert available_memory(tmp_path) == expected
