"""What to adapt and how: one frozen, validated configuration for the whole family of adapters.

``partition`` x ``modulation`` spans the family (docs/method.md names the papers):

============== ===================================== ==========================
modulation     partition                             member
============== ===================================== ==========================
none           none                                  LoRA
none           contiguous_blocks                     MELoRA
weight         none                                  HiRA
weight         spectral_blocks (the default)         SMoA, 2605.21147
weight         aligned_blocks                        SMoA, 2605.21147, restricted to orders
                                                     that kernels share
weight         spectral_bands                        SMoA, 2601.07507
============== ===================================== ==========================

``aligned_blocks`` orders coordinates as ``spectral_blocks`` does, but once for all kernels that
share them, so that a decoder can be relabelled until every block is a slice: the same step for
less (``planning/aligned.py``). The remaining pairs (random blocks, weight-modulated contiguous
blocks, spectral blocks without modulation) are the ablations; bands without modulation mean nothing
and are refused.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias, get_args

from smoa_jax.adapter.views import parse_view
from smoa_jax.checks import require

Partition: TypeAlias = Literal[
    "spectral_blocks",
    "aligned_blocks",
    "spectral_bands",
    "contiguous_blocks",
    "random_blocks",
    "none",
]
ModulationKind: TypeAlias = Literal["weight", "none"]
Scaling: TypeAlias = Literal["alpha/r", "alpha/sqrt(r)"]

#: The kernels that both SMoA papers adapt.
DEFAULT_TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")


def split_evenly(size: int, num_pieces: int) -> tuple[int, ...]:
    """``size`` in ``num_pieces`` pieces; the first ``size mod num_pieces`` have one more [S2]."""
    quotient, remainder = divmod(size, num_pieces)
    return tuple(quotient + (piece < remainder) for piece in range(num_pieces))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmoaConfig:
    """Configuration of an adapter.

    Args:
        rank: R of a kernel, shared out over its subspaces.
        num_subspaces: M, how many blocks or bands (the papers' K).
        partition: How a kernel's entries are divided into subspaces.
        modulation: ``weight`` multiplies the low-rank product by the frozen weight, entry by
            entry; ``none`` adds it as it is.
        alpha: Numerator of the scale; null (None) means each kernel's own R, so that the scale is
            1 under ``alpha/r``.
        dropout: Probability of dropping an input of the adapter's path, while training.
        ranks: Rank of each subspace (they must sum to R); empty for an even split.
        target_modules: Names (suffixes of dotted paths), one regular expression (a string, matched
            against the whole dotted path), or ``"all-linear"``.
        exclude_modules: Likewise, taken out again.
        layers: Indices of the layers to adapt; empty for all.
        rank_pattern: Regular expression on the whole dotted path -> R of the kernels it matches.
        scaling: ``alpha/r`` or, rank-stabilised, ``alpha/sqrt(r)``.
        kernel_views: Regular expression on the dotted path of a kernel -> how its axes form
            layers, inputs and outputs, such as ``"L | D | N H"``; kernels of two axes, or three
            with layers first, need none.
        layer_numbers: Dotted path of a stack of layers -> which of the model's layers its entries
            are, for models of several stacks; ``layers`` then means those. A run fills it in.

    Raises:
        ValueError: for any value or combination that has no meaning.
    """

    rank: int = 32
    num_subspaces: int = 2
    partition: Partition = "spectral_blocks"
    modulation: ModulationKind = "weight"
    alpha: float | None = None
    dropout: float = 0.0
    ranks: tuple[int, ...] = ()
    target_modules: str | Sequence[str] = DEFAULT_TARGETS
    exclude_modules: str | Sequence[str] = ()
    layers: tuple[int, ...] = ()
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    scaling: Scaling = "alpha/r"
    kernel_views: Mapping[str, str] = dataclasses.field(default_factory=dict)
    layer_numbers: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, choices in (
            ("partition", get_args(Partition)),
            ("modulation", get_args(ModulationKind)),
            ("scaling", get_args(Scaling)),
        ):
            require(
                getattr(self, name) in choices,
                f"{name}={getattr(self, name)!r}",
                f"one of {', '.join(choices)}",
            )
        for name in ("ranks", "layers", "target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):  # as YAML and JSON give them
                object.__setattr__(self, name, tuple(getattr(self, name)))
        numbers = {stack: tuple(layers) for stack, layers in self.layer_numbers.items()}
        object.__setattr__(self, "layer_numbers", numbers)
        _check_types(self)
        _check_ranks(self)
        _check_numbers(self)
        _check_patterns(self)

    def to_fields(self) -> dict[str, Any]:
        """All settings by name, as files hold them; ``layer_numbers`` only where there are any."""
        fields = dataclasses.asdict(self)
        if not self.layer_numbers:
            del fields["layer_numbers"]
        return fields

    @property
    def has_blocks(self) -> bool:
        """Whether the subspaces are diagonal blocks of a partition of inputs and outputs."""
        return self.partition.endswith("_blocks")

    def subspace_shapes(self, inputs: int, outputs: int) -> list[tuple[int, int]]:
        """(I_m, O_m) of each subspace of an (I, O) kernel."""
        if not self.has_blocks:
            return [(inputs, outputs)] * self.num_subspaces
        pieces = (split_evenly(size, self.num_subspaces) for size in (inputs, outputs))
        return list(zip(*pieces, strict=True))

    def subspace_ranks(self, rank: int, path: str) -> tuple[int, ...]:
        """R_m of each subspace of the kernel at ``path`` whose total rank is ``rank``."""
        if not self.ranks:
            return split_evenly(rank, self.num_subspaces)
        require(
            sum(self.ranks) == rank,
            f"ranks={self.ranks}, which sum to {sum(self.ranks)}, for {path}, whose rank is {rank} "
            "by rank_pattern",
            "equal sums",
            "leave ranks empty or drop the pattern",
        )
        return self.ranks

    def scale(self, rank: int) -> float:
        """s of a kernel of total rank ``rank``; 0 for rank 0 (a layer left out)."""
        if rank == 0:
            return 0.0
        alpha = float(rank) if self.alpha is None else self.alpha
        return alpha / (rank if self.scaling == "alpha/r" else math.sqrt(rank))

    @classmethod
    def lora(cls, rank: int, **changes: Any) -> SmoaConfig:
        """LoRA (arXiv 2106.09685)."""
        fixed: dict[str, Any] = {"num_subspaces": 1, "partition": "none", "modulation": "none"}
        return cls(rank=rank, **(fixed | changes))

    @classmethod
    def hira(cls, rank: int, **changes: Any) -> SmoaConfig:
        """HiRA (ICLR 2025, OpenReview TwJrTz9cRS)."""
        fixed: dict[str, Any] = {"num_subspaces": 1, "partition": "none", "modulation": "weight"}
        return cls(rank=rank, **(fixed | changes))

    @classmethod
    def melora(cls, rank: int, num_subspaces: int, **changes: Any) -> SmoaConfig:
        """MELoRA (arXiv 2402.17263)."""
        fixed: dict[str, Any] = {"partition": "contiguous_blocks", "modulation": "none"}
        return cls(rank=rank, num_subspaces=num_subspaces, **(fixed | changes))


def _check_types(config: SmoaConfig) -> None:
    whole = {
        "rank": (config.rank,),
        "num_subspaces": (config.num_subspaces,),
        "ranks": config.ranks,
        "layers": config.layers,
        "rank_pattern": tuple(config.rank_pattern.values()),
        "layer_numbers": sum(config.layer_numbers.values(), ()),
    }
    for name, values in whole.items():
        require(
            not any(not isinstance(value, int) or isinstance(value, bool) for value in values),
            f"{name}={getattr(config, name)!r}",
            "whole numbers",
        )
    for name in ("alpha", "dropout"):
        value = getattr(config, name)
        require(
            value is None or (isinstance(value, int | float) and not isinstance(value, bool)),
            f"{name}={value!r}",
            "a number",
        )
    for name in ("target_modules", "exclude_modules"):
        value = getattr(config, name)
        require(
            isinstance(value, str) or all(isinstance(entry, str) for entry in value),
            f"{name}={value!r}",
            "names, or one regular expression",
        )


def _check_ranks(config: SmoaConfig) -> None:
    rank, subspaces = config.rank, config.num_subspaces
    require(rank >= 1, f"rank={rank}", "at least 1")
    require(subspaces >= 1, f"num_subspaces={subspaces}", "at least 1")
    require(
        config.partition != "none" or subspaces == 1,
        f"partition='none' with num_subspaces={subspaces}",
        "num_subspaces=1, or a partition that makes subspaces, such as 'spectral_blocks'",
    )
    require(
        config.partition != "spectral_bands" or config.modulation != "none",
        "partition='spectral_bands' with modulation='none'",
        "modulation='weight', since a band is a part of the weight",
        "use 'none' as partition for LoRA",
    )
    if config.ranks:
        require(
            len(config.ranks) == subspaces and min(config.ranks) >= 1,
            f"ranks={config.ranks}",
            f"{subspaces} positive ranks, one for each of num_subspaces={subspaces}",
        )
        require(
            sum(config.ranks) == rank,
            f"ranks={config.ranks}, which sum to {sum(config.ranks)}",
            f"a sum of rank={rank}",
            "change one of the two",
        )
    for pattern, value in [("rank", rank), *config.rank_pattern.items()]:
        require(
            value >= subspaces,
            f"rank {value} ({pattern}) for {subspaces} subspaces",
            "at least one rank for each",
            "raise the rank or lower num_subspaces",
        )


def _check_numbers(config: SmoaConfig) -> None:
    require(
        config.alpha is None or (math.isfinite(config.alpha) and config.alpha > 0),
        f"alpha={config.alpha}",
        "a positive number, or None for R",
    )
    require(0.0 <= config.dropout < 1.0, f"dropout={config.dropout}", "0 <= dropout < 1")
    require(
        not any(layer < 0 for layer in config.layers)
        and len(set(config.layers)) == len(config.layers),
        f"layers={config.layers}",
        "distinct indices from 0",
    )


def _check_patterns(config: SmoaConfig) -> None:
    require(
        bool(config.target_modules),
        "empty target_modules",
        "names such as 'q_proj', a regular expression or 'all-linear'",
    )
    regexes = [("rank_pattern", p) for p in config.rank_pattern]
    regexes += [("kernel_views", p) for p in config.kernel_views]
    for name in ("target_modules", "exclude_modules"):
        value = getattr(config, name)
        if isinstance(value, str) and value and value != "all-linear":
            regexes.append((name, value))
    for name, pattern in regexes:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"got {name}={pattern!r}, not a regular expression ({error}); expected one that "
                "matches a whole dotted path"
            ) from error
    for view in config.kernel_views.values():
        parse_view(view)
