"""Which kernels of a parameter tree an adapter touches.

Matching follows PEFT: a list matches suffixes of dotted module paths, a string is a regular
expression that must match the whole path, ``all-linear`` takes every kernel but heads and
embeddings. Whatever is asked for and matches nothing is an error that lists near misses: a silent
miss once made a neighbouring trainer train the whole model.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from smoa_jax.adapter.config import SmoaConfig
from smoa_jax.adapter.types import SMOA_KEY, Params, is_modulation
from smoa_jax.adapter.views import View, view_of
from smoa_jax.checks import refuse, require

KERNEL_KEY = "kernel"
_HEADS_AND_EMBEDDINGS = {"lm_head", "head", "logits", "embed_tokens", "embedder", "embed", "wte"}


@dataclasses.dataclass(frozen=True)
class Target:
    """One kernel to adapt: where it is and what its adapter looks like."""

    path: tuple[str, ...]  # of the module, the dict that holds kernel and smoa
    key: str  # the kernel's own key in it
    shape: tuple[int, ...]
    dtype: Any
    view: View
    view_text: str
    rank: int
    subspace_ranks: tuple[int, ...]
    selected: tuple[bool, ...]  # one per layer; one entry when there is no layer axis
    layers: tuple[int, ...]  # their indices in the model; 0 when there is no layer axis

    @property
    def name(self) -> str:
        """The dotted path, as configurations and reports write it."""
        return ".".join(self.path)

    @property
    def kernel_path(self) -> tuple[str, ...]:
        """From the root of the tree to the kernel."""
        return (*self.path, self.key)

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """``(L?, I, O)``."""
        return self.view.matrix_shape(self.shape)

    @property
    def leading(self) -> tuple[int, ...]:
        """``(L,)`` for a stacked kernel, ``()`` otherwise."""
        return self.matrix_shape[:-2]


def walk(
    tree: Mapping[str, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every leaf or modulation of a nested dict with its path, in the dict's order.

    Raises:
        ValueError: for a list or tuple, whose kernels would go unseen; a key that is no text.
    """
    for key, value in tree.items():
        if not isinstance(key, str):
            refuse(
                f"the key {key!r} ({type(key).__name__}) in {'.'.join(path) or 'the tree'}",
                "nested dicts whose keys are texts",
                "write it as one, such as '0'",
            )
        if isinstance(value, Mapping):
            yield from walk(value, (*path, key))
        elif type(value) in (list, tuple):
            refuse(
                f"a {type(value).__name__} at {'.'.join((*path, key))}",
                "nested dicts of arrays",
                "make it a dict, such as {'0': ..., '1': ...}",
            )
        else:
            yield (*path, key), value


def lookup(params: Params, path: Sequence[str]) -> Any:
    """What lies at the end of ``path``."""
    for key in path:
        params = params[key]
    return params


def replaced(params: Params, path: tuple[str, ...], value: Any) -> Params:
    """A copy of the dicts along ``path`` with ``value`` at its end, whether or not it had one."""
    if not path:
        return value
    return {**params, path[0]: replaced(params.get(path[0], {}), path[1:], value)}


def find_targets(params: Params, config: SmoaConfig) -> list[Target]:
    """The kernels of ``params`` that ``config`` adapts, in sorted order of path.

    Raises:
        ValueError: if there is none, or if any name, pattern or layer matches nothing.
    """
    kernels = _kernels(params, config)
    chosen = match_names("target_modules", config.target_modules, list(kernels))
    if config.exclude_modules:
        chosen -= match_names("exclude_modules", config.exclude_modules, list(kernels))
    targets = [_target(name, kernels[name], config) for name in sorted(chosen)]
    selected = [target for target in targets if any(target.selected)]
    _check_patterns(params, config, list(kernels), targets)
    _check_layers(config.layers, targets, selected)
    for target in selected:
        _check_capacity(target, config)
    return selected


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """A leaf that could be adapted."""

    path: tuple[str, ...]  # of the leaf
    leaf: Any
    view_text: str


def _kernels(params: Params, config: SmoaConfig) -> dict[str, _Kernel]:
    """Every leaf that could be adapted, by the dotted path of its module."""
    require(
        isinstance(params, dict),
        f"params of type {type(params).__name__}",
        "a nested dict of arrays",
        "unwrap other containers first",
    )
    found: dict[str, _Kernel] = {}
    for path, leaf in walk(params):
        require(
            not is_modulation(leaf),
            f"params that already hold an adapter ({'.'.join(path)})",
            "base params",
            "merge it first, or start from the base",
        )
        text = config.kernel_views.get(_view_pattern(path, config) or "", "")
        if len(leaf.shape) >= 2 and (path[-1] == KERNEL_KEY or text):
            name = ".".join(path[:-1])
            require(
                name not in found,
                f"two viewed kernels in module {name}",
                f"one, since their adapter lies beside them under {SMOA_KEY!r}",
                "narrow the pattern in kernel_views",
            )
            found[name] = _Kernel(path, leaf, text)
    return found


def _target(name: str, kernel: _Kernel, config: SmoaConfig) -> Target:
    """What the adapter of a kernel looks like."""
    shape, dtype = tuple(kernel.leaf.shape), kernel.leaf.dtype
    require(
        jnp.issubdtype(dtype, jnp.floating),
        f"a kernel of {dtype} at {name}",
        "floating weights, since a merge would round the update away",
        "dequantise the base, or exclude the kernel",
    )
    pattern = _first_match(config.rank_pattern, name)
    rank = config.rank if pattern is None else config.rank_pattern[pattern]
    view = view_of(kernel.view_text, len(shape), name)
    leading = view.matrix_shape(shape)[:-2]
    layers = stacked_layers(config.layer_numbers, name, leading[0]) if leading else ()
    return Target(
        path=kernel.path[:-1],
        key=kernel.path[-1],
        shape=shape,
        dtype=dtype,
        view=view,
        view_text=kernel.view_text,
        rank=rank,
        subspace_ranks=config.subspace_ranks(rank, name),
        selected=_selected(config.layers, name, layers),
        layers=layers or (0,),
    )


def match_names(field: str, wanted: str | Sequence[str], names: list[str]) -> set[str]:
    """The dotted paths that ``target_modules`` or ``exclude_modules`` mean.

    Raises:
        ValueError: if any name or pattern matches nothing.
    """
    if isinstance(wanted, str):
        if wanted == "all-linear":
            return {n for n in names if not _HEADS_AND_EMBEDDINGS & set(n.split("."))}
        chosen = {name for name in names if re.fullmatch(wanted, name)}
        _check_matches(field, wanted, chosen, names, is_regex=True)
        return chosen
    chosen: set[str] = set()
    for suffix in wanted:
        matched = {name for name in names if name == suffix or name.endswith("." + suffix)}
        _check_matches(field, suffix, matched, names, is_regex=False)
        chosen |= matched
    return chosen


def _first_match(patterns: Iterable[str], *names: str) -> str | None:
    """The first regular expression that matches one of the names whole."""
    return next((p for p in patterns if any(re.fullmatch(p, name) for name in names)), None)


def _view_pattern(path: tuple[str, ...], config: SmoaConfig) -> str | None:
    """The entry of ``kernel_views`` for a leaf: by its own path or its module's."""
    return _first_match(config.kernel_views, ".".join(path), ".".join(path[:-1]))


def stacked_layers(
    layer_numbers: Mapping[str, tuple[int, ...]], name: str, depth: int
) -> tuple[int, ...]:
    """The model's index of each of the ``depth`` layers of the kernel at a dotted path.

    Raises:
        ValueError: if ``layer_numbers`` knows more or fewer of them.
    """
    stacks = [stack for stack in layer_numbers if name.startswith(f"{stack}.")]
    numbers = layer_numbers[stacks[0]] if stacks else tuple(range(depth))
    require(
        len(numbers) == depth,
        f"layer_numbers of {len(numbers)} layers for {name}, which has {depth}",
        "one for each",
    )
    return numbers


def _selected(wanted: tuple[int, ...], name: str, layers: tuple[int, ...]) -> tuple[bool, ...]:
    """Which layers of a kernel to adapt; an unstacked kernel's index is the number in its path."""
    if not layers:
        return (not wanted or _layer_number(name) <= set(wanted),)
    return tuple(not wanted or layer in wanted for layer in layers)


def _layer_number(name: str) -> set[int]:
    """The index of an unstacked layer, if the path holds a number."""
    return {int(number) for number in re.findall(r"(?:^|[._])(\d+)(?=\.|$)", name)[:1]}


# ------------------------------------------------------------------------------------- refusals


def _check_matches(
    field: str, pattern: str, matched: set[Any], names: list[str], *, is_regex: bool
) -> None:
    """Refuse a name or pattern that matches nothing, with near misses."""
    if matched:
        return
    what, last = f"{field} {pattern!r}", {name.rsplit(".", 1)[-1] for name in names}
    is_module = field.endswith("modules")
    if is_regex and any(name.endswith("." + pattern) for name in names):
        refuse(
            f"{what}, which matches no kernel, since a regular expression must match a whole "
            "dotted path",
            f"one such as '.*\\.{pattern}'" + (f", or a list such as ['{pattern}']" * is_module),
        )
    near = difflib.get_close_matches(pattern, sorted(last | set(names)), n=3, cutoff=0.4)
    kinds = "a regular expression for a whole dotted path"
    if is_module:
        kinds = f"the end of a dotted path (in a list), {kinds} (a string) or 'all-linear'"
    refuse(
        f"{field} entry {pattern!r}, which matches no kernel",
        kinds,
        (f"near misses: {', '.join(near)}; " if near else "")
        + f"kernels there are: {', '.join(sorted(last)[:12]) or 'no kernels at all'}",
    )


def _check_patterns(
    params: Params, config: SmoaConfig, names: list[str], targets: list[Target]
) -> None:
    """Refuse patterns of views and ranks that apply to nothing, and targets that are none."""
    used = {
        "kernel_views": {_view_pattern(path, config) for path, _ in walk(params)},
        "rank_pattern": {_first_match(config.rank_pattern, target.name) for target in targets},
    }
    for field, patterns in used.items():
        for pattern in getattr(config, field):
            _check_matches(field, pattern, patterns & {pattern}, names, is_regex=True)
    require(
        bool(targets),
        f"target_modules={config.target_modules!r} with exclude_modules="
        f"{config.exclude_modules!r}, which leave no kernel",
        "at least one",
    )


def _check_layers(layers: tuple[int, ...], targets: list[Target], selected: list[Target]) -> None:
    """Refuse layers that no target has."""
    known: set[int] = set()
    for target in targets:
        known |= set(target.layers) if target.leading else _layer_number(target.name)
    unknown = [str(layer) for layer in layers if layer not in known]
    if known and unknown:
        refuse(
            f"layers={layers}, of which {', '.join(unknown)} is no layer of the targeted kernels",
            f"indices from {min(known)} to {max(known)}",
        )
    require(
        not unknown and bool(selected),
        f"layers={layers}, which select no layer",
        "indices of existing layers",
    )


def _check_capacity(target: Target, config: SmoaConfig) -> None:
    """Refuse a partition or rank that the kernel cannot hold."""
    inputs, outputs = target.matrix_shape[-2:]
    subspaces = config.num_subspaces
    require(
        subspaces <= min(inputs, outputs),
        f"num_subspaces={subspaces} for {target.name}, whose kernel is {inputs} x {outputs}",
        f"at most {min(inputs, outputs)}",
        "lower it or exclude the kernel",
    )
    sizes = config.subspace_shapes(inputs, outputs)
    for subspace, (rank, (rows, columns)) in enumerate(
        zip(target.subspace_ranks, sizes, strict=True)
    ):
        require(
            rank <= min(rows, columns),
            f"rank {rank} for subspace {subspace} of {target.name}, which is {rows} x {columns}",
            f"at most {min(rows, columns)}",
            "lower the rank, or give this kernel its own in rank_pattern",
        )
