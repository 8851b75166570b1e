"""How much memory a decomposition takes, and how much there is for it on this host.

A container's limit counts as well as the machine's free memory: what goes beyond either is killed.
"""

from __future__ import annotations

from pathlib import Path

#: (limit, use) of this process's control group, in the two layouts that Linux has.
_GROUP_FILES = (
    ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory.current"),
    (
        "sys/fs/cgroup/memory/memory.limit_in_bytes",
        "sys/fs/cgroup/memory/memory.usage_in_bytes",
    ),
)
#: Where a system doesn't say: more than any job would take.
_UNKNOWN = 1 << 62


def decomposition_bytes(inputs: int, outputs: int, num_bands: int = 1) -> int:
    """Peak bytes of decomposing one (I, O) weight by the Gram matrix of its smaller side q.

    In float32: the weight and its transposed or projected copies (four of its size: as read, cast,
    projected, and in descending order), and of the Gram matrix five: itself, the eigenvectors in
    both orders, and LAPACK's workspace of twice its size. Each band but the last takes two and a
    half more of the weight's size: its part, the copy that is stacked, and temporaries.
    """
    smaller, size = min(inputs, outputs), inputs * outputs
    return 4 * (4 * size + 5 * smaller * smaller) + 10 * (num_bands - 1) * size


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that this process may still take, by the machine and by its control group."""
    free = [_UNKNOWN]
    try:
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free.append(int(line.split()[1]) * 1024)
    except (OSError, ValueError):
        pass
    for limit, use in _GROUP_FILES:
        try:
            free.append(int((root / limit).read_text()) - int((root / use).read_text()))
        except (OSError, ValueError):  # no such layout, or no limit ("max")
            continue
    return max(min(free), 0)
