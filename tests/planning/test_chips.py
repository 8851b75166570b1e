"""Names of slices."""

from __future__ import annotations

import pytest

from smoa_jax.planning.chips import CHIPS, parse_topology


@pytest.mark.parametrize(
    ("text", "topology", "count"),
    [
        ("v5e-16", "v5e:4x4", 16),
        ("v5e-8", "v5e:2x4", 8),
        ("v5e-1", "v5e:1x1", 1),
        ("v5e:2x2", "v5e:2x2", 4),
        ("v5p-128", "v5p:4x4x4", 64),
        ("v5p-32", "v5p:2x2x4", 16),
        ("v5p-8", "v5p:2x2x1", 4),
        ("V6E-64", "v6e:8x8", 64),
    ],
)
def test_a_tpu_slice_is_known_by_its_name_or_shape(text, topology, count):
    where = parse_topology(text)
    assert (where.topology, where.count) == (topology, count)
    assert where.chip is CHIPS[topology.split(":")[0]]


@pytest.mark.parametrize(
    ("text", "name", "count"),
    [("h100x8", "h100", 8), ("l4", "l4", 1), ("a100-40gbx8", "a100-40gb", 8)],
)
def test_gpus_are_counted(text, name, count):
    where = parse_topology(text)
    assert (where.chip.name, where.count, where.shape) == (name, count, ())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v9-8", r"expected a chip \(v5e, v5p, .*\) and how many"),
        ("v5e-12", "expected a slice of 1, 2, 4, 8, ... chips; choose another"),
        ("v5p-1", "expected a slice of 1, 2, 4, 8, ... cores, 2 of them a chip"),
        ("v5p:4x4", "expected 3 sizes of a torus"),
        ("h100-8", "expected a number of cards, such as h100x8"),
        ("h100x0", "expected at least one card"),
    ],
)
def test_other_names_are_refused_with_what_would_do(text, message):
    with pytest.raises(ValueError, match=message):
        parse_topology(text)


def test_peaks_are_those_of_the_makers_pages():
    peaks = {name: (chip.flops / 1e12, chip.memory / 1e9) for name, chip in CHIPS.items()}
    assert peaks["h100"] == (989, 80)
    assert peaks["v5p"][0] == 459
    assert all(chip.source.startswith("https://") for chip in CHIPS.values())
