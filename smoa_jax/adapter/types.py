"""The modulations: typed pytree nodes that sit under the key ``smoa`` beside a frozen ``kernel``.

One class per kind, because each kind holds other frozen tensors:

- ``LowRank``: one subspace, LoRA [L] or, multiplied by the weight, HiRA [H];
- ``Blocks``: diagonal blocks of a partition of inputs and outputs, MELoRA [M] or SMoA [S2];
- ``Bands``: bands of the weight's spectrum, SMoA [S1].

Every array is floating (block ids too: exact small floats), since integer leaves break ``jax.grad``
and optax over a whole tree. Exactly ``a`` and ``b`` train. With stacked kernels every array has the
leading axis L. There is no validation here: unflattening puts masks, specs and abstract leaves into
these nodes; ``tree.py`` checks what users hand in.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeAlias

import jax

#: Name of the key that holds a modulation, beside its kernel.
SMOA_KEY = "smoa"
#: The two trained tensors of every modulation.
TRAINABLE_FIELDS = ("a", "b")

_STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LowRank:
    """``W' = W + s * G * (a b^T)`` with G = W if ``weight_modulated`` (HiRA), else ones (LoRA)."""

    a: Any  # (L?, I, R) trained
    b: Any  # (L?, O, R) trained
    scale: Any  # (L?,) s
    ranks: Any  # (L?, 1) true rank of each layer; columns beyond it are padding
    weight_modulated: bool = dataclasses.field(default=True, metadata=_STATIC)
    dropout: float = dataclasses.field(default=0.0, metadata=_STATIC)
    view: str = dataclasses.field(default="", metadata=_STATIC)  # "" for (L?, I, O)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
    """``W'_ij = W_ij + s * G_ij * [in_block_i = out_block_j] * <a_i, b_j>`` (permutation-free)."""

    a: Any  # (L?, I, R_m) trained, rows in the kernel's own order
    b: Any  # (L?, O, R_m) trained
    in_block: Any  # (L?, I) block id of each input, 0..M-1, as floats
    out_block: Any  # (L?, O)
    scale: Any  # (L?,)
    ranks: Any  # (L?, M)
    weight_modulated: bool = dataclasses.field(default=True, metadata=_STATIC)
    dropout: float = dataclasses.field(default=0.0, metadata=_STATIC)
    view: str = dataclasses.field(default="", metadata=_STATIC)
    # Ids ascend in even pieces, so every block is a slice and its product takes no other.
    contiguous: bool = dataclasses.field(default=False, metadata=_STATIC)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Bands:
    """``W' = W + s * sum_m W_m * (a_m b_m^T)``, the last band being W minus the others."""

    a: Any  # (L?, M, I, R_m) trained
    b: Any  # (L?, M, O, R_m) trained
    bands: Any  # (L?, M-1, I, O) W_1 .. W_{M-1} in the kernel's dtype
    cuts: Any  # (L?, M-1) first singular index of bands 2..M
    norms: Any  # (L?, M) Frobenius norms of W_1 .. W_M
    scale: Any  # (L?,)
    ranks: Any  # (L?, M)
    weight_modulated: bool = dataclasses.field(default=True, metadata=_STATIC)
    dropout: float = dataclasses.field(default=0.0, metadata=_STATIC)
    view: str = dataclasses.field(default="", metadata=_STATIC)


#: Any modulation node.
Modulation: TypeAlias = LowRank | Blocks | Bands
#: A nested dict of arrays, as Flax keeps parameters; modulations are nodes of it.
Params: TypeAlias = dict[str, Any]
MODULATION_TYPES = (LowRank, Blocks, Bands)


def is_modulation(node: object) -> bool:
    """Whether ``node`` is a modulation, for ``is_leaf`` arguments."""
    return isinstance(node, MODULATION_TYPES)


def tensor_fields(node: Modulation) -> dict[str, Any]:
    """The tensors of a modulation by name, its settings left out."""
    return {
        field.name: getattr(node, field.name)
        for field in dataclasses.fields(node)
        if not field.metadata.get("static")
    }
