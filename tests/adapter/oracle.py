"""The published algorithm written down a second time, in plain NumPy, for tests to compare with.

Nothing here imports JAX or the project. Where the project has a permutation-free formula, this file
permutes, cuts, multiplies block by block and permutes back, as the papers do; where the project
keeps `W - (W_1 + ...)` as the last band, this file multiplies every band out of the decomposition.
So the two can only agree by computing the same mathematics.

Sources: [S2] arXiv 2605.21147 (spectral blocks), [S1] arXiv 2601.07507 (spectral bands),
[H] HiRA, [L] LoRA arXiv 2106.09685, [M] MELoRA arXiv 2402.17263.

The second half reads the project's modulation nodes (any object with their fields) into lists of
per-subspace factors. It believes the node's block ids and ranks; tests compare those separately.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

#: The guard in the centre of mass [S2]: the smallest normal float32.
SMALLEST_NORMAL = float(np.finfo(np.float32).tiny)


# --- partitions -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockPartition:
    """The coordinates of each block, in the order in which the reordered matrix holds them."""

    inputs: list[Array]
    outputs: list[Array]


def even_sizes(total: int, parts: int) -> list[int]:
    """Sizes of `parts` consecutive pieces of `total` things; the first `total % parts` are larger.

    Also the rule by which the rank is split over the subspaces.
    """
    whole, left_over = total // parts, total % parts
    return [whole + 1 if piece < left_over else whole for piece in range(parts)]


def consecutive_pieces(order: Array, parts: int) -> list[Array]:
    pieces, start = [], 0
    for size in even_sizes(len(order), parts):
        pieces.append(np.asarray(order[start : start + size]))
        start += size
    assert start == len(order)
    return pieces


def centre_of_mass(vectors: Array, singular_values: Array) -> Array:
    """Score of each coordinate (row of U or of V): `sum_j j e_j / max(sum_j e_j, eps)` [S2]."""
    scores = np.zeros(vectors.shape[0], vectors.dtype)
    for coordinate, row in enumerate(vectors):
        energy = row**2 * singular_values**2
        weighted = np.arange(len(singular_values), dtype=vectors.dtype) * energy
        scores[coordinate] = weighted.sum() / max(energy.sum(), SMALLEST_NORMAL)
    return scores


def spectral_scores(weight: Array, dtype: type = np.float32) -> tuple[Array, Array]:
    """Scores of inputs and of outputs, from an economy SVD in `dtype` (float32 as published).

    NumPy decomposes in float64 and rounds the factors to `dtype`, which is float32 at its best.
    """
    left, singular_values, right_transposed = np.linalg.svd(
        np.asarray(weight).astype(dtype), full_matrices=False
    )
    return (
        centre_of_mass(left, singular_values),
        centre_of_mass(right_transposed.T, singular_values),
    )


def spectral_blocks(weight: Array, num_subspaces: int) -> BlockPartition:
    input_scores, output_scores = spectral_scores(weight)
    return BlockPartition(
        inputs=consecutive_pieces(np.argsort(input_scores, kind="stable"), num_subspaces),
        outputs=consecutive_pieces(np.argsort(output_scores, kind="stable"), num_subspaces),
    )


def contiguous_blocks(shape: tuple[int, int], num_subspaces: int) -> BlockPartition:
    return BlockPartition(
        inputs=consecutive_pieces(np.arange(shape[0]), num_subspaces),
        outputs=consecutive_pieces(np.arange(shape[1]), num_subspaces),
    )


def block_ids(pieces: list[Array]) -> Array:
    ids = np.full(sum(len(piece) for piece in pieces), -1)
    for block, piece in enumerate(pieces):
        assert np.all(ids[piece] == -1), "a coordinate lies in two blocks"
        ids[piece] = block
    return ids


def may_differ(scores: Array, num_subspaces: int, smaller_side: int) -> Array:
    """Coordinates whose block may depend on rounding: score within `1e-3 q` of a cut.

    A cut lies midway between the last score of a piece and the first of the next one.
    """
    in_order = np.sort(scores.astype(np.float64))
    undecided = np.zeros(len(scores), bool)
    end = 0
    for size in even_sizes(len(scores), num_subspaces)[:-1]:
        end += size
        cut = (in_order[end - 1] + in_order[end]) / 2
        undecided |= np.abs(scores - cut) <= 1e-3 * smaller_side
    return undecided


def band_cuts(singular_values: Array, num_subspaces: int) -> list[list[int]]:
    """The indices in each band: `(m-1)/M < E(j) <= m/M`, the last band taking the rest [S1]."""
    values = [float(value) for value in singular_values]
    total = math.fsum(values)
    bands: list[list[int]] = [[] for _ in range(num_subspaces)]
    for index in range(len(values)):
        energy = math.fsum(values[: index + 1]) / total
        for band in range(1, num_subspaces + 1):
            above = energy > (band - 1) / num_subspaces
            if band == num_subspaces or (above and energy <= band / num_subspaces):
                bands[band - 1].append(index)
                break
    for band, members in enumerate(bands):
        if not members:
            raise ValueError(f"band {band} of {num_subspaces} is empty")
    return bands


def spectral_bands(weight: Array, num_subspaces: int) -> tuple[list[Array], list[int]]:
    """Every `W_m`, multiplied out of its own part of the SVD, and the first index of bands 2..M."""
    left, singular_values, right_transposed = np.linalg.svd(
        np.asarray(weight).astype(np.float64), full_matrices=False
    )
    bands = band_cuts(singular_values, num_subspaces)
    matrices = [
        left[:, members] @ np.diag(singular_values[members]) @ right_transposed[members]
        for members in bands
    ]
    return matrices, [members[0] for members in bands[1:]]


def bands_that_rounding_decides(weight: Array, num_subspaces: int) -> bool:
    """Whether a band is empty, or an energy so near a bound that float32 can't tell the sides."""
    singular_values = np.linalg.svd(np.asarray(weight).astype(np.float64), compute_uv=False)
    energies = np.cumsum(singular_values) / singular_values.sum()
    bounds = np.arange(1, num_subspaces) / num_subspaces
    try:
        band_cuts(singular_values, num_subspaces)
    except ValueError:
        return True
    return bool(np.any(np.abs(energies[:, None] - bounds) < 1e-5))


def band_rounding(weight: Array, cuts: list[int]) -> float:
    """How far a float32 decomposition may move an entry of a band.

    Rounding mixes the singular vectors on both sides of a cut in proportion to eps over the
    relative gap between their singular values.
    """
    values = np.linalg.svd(np.asarray(weight).astype(np.float64), compute_uv=False)
    gap = min((values[cut - 1] - values[cut] for cut in cuts), default=values[0])
    return float(2 * np.finfo(np.float32).eps * values[0] ** 2 / gap)


# --- scale and initial values ---------------------------------------------------------------------


def update_scale(alpha: float | None, rank: int, scaling: str) -> float:
    """`alpha / R` or `alpha / sqrt(R)` with the total R; alpha is R itself unless given."""
    alpha = float(rank) if alpha is None else alpha
    return {"alpha/r": alpha / rank, "alpha/sqrt(r)": alpha / math.sqrt(rank)}[scaling]


def initial_bound(block_inputs: int) -> float:
    return 1.0 / math.sqrt(block_inputs)


# --- adapted weights ------------------------------------------------------------------------------


def adapted_by_blocks(
    weight: Array,
    partition: BlockPartition,
    a: list[Array],
    b: list[Array],
    scale: float,
    *,
    weight_modulated: bool,
) -> Array:
    """Permute W, add each block's own update on the diagonal, permute back [S2], [M]."""
    rows, columns = np.concatenate(partition.inputs), np.concatenate(partition.outputs)
    permuted = np.asarray(weight).astype(np.float64)[rows][:, columns]
    row = column = 0
    for a_block, b_block in zip(a, b, strict=True):
        height, width = len(a_block), len(b_block)
        place = np.s_[row : row + height, column : column + width]
        update = scale * (a_block.astype(np.float64) @ b_block.astype(np.float64).T)
        permuted[place] += permuted[place] * update if weight_modulated else update
        row, column = row + height, column + width
    assert (row, column) == permuted.shape
    return permuted[np.argsort(rows)][:, np.argsort(columns)]


def adapted_by_bands(bands: list[Array], a: list[Array], b: list[Array], scale: float) -> Array:
    """`sum_m W_m * (1 + s A_m B_m^T)`, the same as W plus every band's update [S1]."""
    return sum(
        (
            band * (1.0 + scale * (a_band.astype(np.float64) @ b_band.astype(np.float64).T))
            for band, a_band, b_band in zip(bands, a, b, strict=True)
        ),
        np.zeros(bands[0].shape),
    )


def adapted_by_lora(weight: Array, a: Array, b: Array, scale: float) -> Array:
    return weight.astype(np.float64) + scale * (a.astype(np.float64) @ b.astype(np.float64).T)


def adapted_by_hira(weight: Array, a: Array, b: Array, scale: float) -> Array:
    update = a.astype(np.float64) @ b.astype(np.float64).T
    return weight.astype(np.float64) + scale * weight.astype(np.float64) * update


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gradients:
    x: Array
    a: list[Array]
    b: list[Array]


def subspace_modulation(
    weight: Array, partition: BlockPartition | None, bands: list[Array] | None, count: int
) -> list[Array]:
    """The frozen `G_m` as whole (I, O) matrices: zero outside the block for blocks."""
    if bands is not None:
        return bands
    if partition is None:
        return [weight.astype(np.float64)] * count
    masked = []
    for inputs, outputs in zip(partition.inputs, partition.outputs, strict=True):
        block = np.zeros(weight.shape)
        block[np.ix_(inputs, outputs)] = weight[np.ix_(inputs, outputs)]
        masked.append(block)
    return masked


def gradients(
    x: Array,
    cotangent: Array,
    adapted: Array,
    modulation: list[Array],
    a: list[Array],
    b: list[Array],
    scale: float,
) -> Gradients:
    """By hand, from the dense weight gradient; `a` and `b` here are whole (I, R_m) and (O, R_m)."""
    dense = x.astype(np.float64).T @ cotangent.astype(np.float64)
    return Gradients(
        x=cotangent.astype(np.float64) @ adapted.T,
        a=[scale * (g * dense) @ b_m for g, b_m in zip(modulation, b, strict=True)],
        b=[scale * (g * dense).T @ a_m for g, a_m in zip(modulation, a, strict=True)],
    )


# --- reading the project's nodes ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer of a modulation node: its factors, one per subspace, without padding."""

    kind: str
    ranks: list[int]
    scale: float
    weight_modulated: bool
    a: list[Array]  # (I, R_m), rows of other blocks zeroed
    b: list[Array]
    partition: BlockPartition | None

    def adapted(self, weight: Array) -> Array:
        """The adapted weight by the papers' own formulas."""
        if self.kind == "Blocks":
            assert self.partition is not None
            return adapted_by_blocks(
                weight,
                self.partition,
                [a[rows] for a, rows in zip(self.a, self.partition.inputs, strict=True)],
                [b[rows] for b, rows in zip(self.b, self.partition.outputs, strict=True)],
                self.scale,
                weight_modulated=self.weight_modulated,
            )
        if self.kind == "Bands":
            bands, _ = spectral_bands(weight, len(self.ranks))
            return adapted_by_bands(bands, self.a, self.b, self.scale)
        formula = adapted_by_hira if self.weight_modulated else adapted_by_lora
        return formula(weight, self.a[0], self.b[0], self.scale)

    def rounding(self, weight: Array) -> float:
        """What float32 may do to an entry of the adapted weight."""
        largest = 1e-6 * float(np.abs(self.adapted(weight)).max())
        if self.kind != "Bands":
            return largest
        products = [np.abs(a @ b.T).max() for a, b in zip(self.a, self.b, strict=True)]
        _, cuts = spectral_bands(weight, len(self.ranks))
        return largest + self.scale * float(max(products)) * band_rounding(weight, cuts)

    def modulation(self, weight: Array) -> list[Array]:
        """G_m of each subspace, as whole matrices."""
        ones_or_weight = weight if self.weight_modulated else np.ones(weight.shape)
        bands = spectral_bands(weight, len(self.ranks))[0] if self.kind == "Bands" else None
        return subspace_modulation(ones_or_weight, self.partition, bands, len(self.ranks))


def read_layer(node: Any, layer: int | None) -> Layer:
    """Take one layer (None: a kernel that is not stacked) of a modulation node apart."""

    def field(name: str) -> Array:
        value = np.asarray(getattr(node, name))
        return value if layer is None else value[layer]

    kind = type(node).__name__
    ranks = [int(rank) for rank in np.atleast_1d(field("ranks"))]
    a, b, partition = field("a"), field("b"), None
    if kind == "Blocks":
        in_block, out_block = field("in_block"), field("out_block")
        members = range(len(ranks))
        partition = BlockPartition(
            inputs=[np.flatnonzero(in_block == block) for block in members],
            outputs=[np.flatnonzero(out_block == block) for block in members],
        )
        a_parts = [np.where((in_block == m)[:, None], a, 0)[:, : ranks[m]] for m in members]
        b_parts = [np.where((out_block == m)[:, None], b, 0)[:, : ranks[m]] for m in members]
    elif kind == "Bands":
        a_parts = [a[m][:, : ranks[m]] for m in range(len(ranks))]
        b_parts = [b[m][:, : ranks[m]] for m in range(len(ranks))]
    else:
        a_parts, b_parts = [a[:, : ranks[0]]], [b[:, : ranks[0]]]
    return Layer(
        kind=kind,
        ranks=ranks,
        scale=float(field("scale")),
        weight_modulated=bool(node.weight_modulated),
        a=a_parts,
        b=b_parts,
        partition=partition,
    )


def padding_mask(node: Any, name: str) -> Array:
    """True on the entries of `a` or `b` that lie beyond the rank of their subspace or layer."""
    factor, ranks = np.asarray(getattr(node, name)), np.asarray(node.ranks).astype(int)
    column = np.arange(factor.shape[-1])
    kind = type(node).__name__
    if kind == "Bands":
        limit = ranks[..., None, None]
    elif kind == "Blocks":
        ids = np.asarray(node.in_block if name == "a" else node.out_block).astype(int)
        limit = np.take_along_axis(ranks, ids, axis=-1)[..., None]
    else:
        limit = ranks[..., None]
    return np.broadcast_to(column >= limit, factor.shape)


def modulations(params: dict, prefix: str = "") -> dict[str, tuple[Array, Any]]:
    """Kernel and modulation of every adapted module of a tree, by dotted path."""
    found = {}
    for key, value in params.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict):
            if "smoa" in value:
                found[path] = (np.asarray(value["kernel"]).astype(np.float32), value["smoa"])
            found |= modulations(value, f"{path}.")
    return found


def with_random_factors(params: dict, seed: int, spread: float = 0.5) -> dict:
    """The tree with random `a` and `b`, so that each `A_m B_m^T` has standard deviation `spread`.

    Padding stays zero, as training leaves it.
    """
    rng = np.random.default_rng(seed)

    def visit(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: visit(child) for key, child in value.items()}
        return randomised(value) if hasattr(value, "ranks") else value

    def randomised(node: Any) -> Any:
        factors = {}
        for name in ("a", "b"):
            padding = padding_mask(node, name)
            used = np.maximum((~padding).sum(-1, keepdims=True), 1)
            noise = rng.normal(size=padding.shape) * np.sqrt(spread / np.sqrt(used))
            factors[name] = np.where(padding, 0.0, noise).astype(np.float32)
        return dataclasses.replace(node, **factors)

    return visit(params)
