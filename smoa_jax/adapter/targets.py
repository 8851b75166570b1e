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
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp

from smoa_jax.adapter.config import SmoaConfig
from smoa_jax.adapter.types import SMOA_KEY, Params, is_modulation
from smoa_jax.adapter.views import View, view_of

KERNEL_KEY = "kernel"
_HEADS_AND_EMBEDDINGS = {"lm_head", "head", "logits", "embed_tokens", "embedder", "embed", "wte"}


@dataclasses.dataclass(frozen=True)
class Target:
    """One kernel to adapt: where it is and what its adapter looks like."""

    path: tuple[str, ...]  # of the module, the dict that holds kernel and smoa
    key: str  # the kernel's own key in it
    shape: tuple[int, ...]
    view: View
    view_text: str
    rank: int
    subspace_ranks: tuple[int, ...]
    selected: tuple[bool, ...]  # one per layer; one entry when there is no layer axis

    @property
    def name(self) -> str:
        """The dotted path, as configurations and reports write it."""
        return ".".join(self.path)

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """``(L?, I, O)``."""
        return self.view.matrix_shape(self.shape)

    @property
    def leading(self) -> tuple[int, ...]:
        """``(L,)`` for a stacked kernel, ``()`` otherwise."""
        return self.matrix_shape[:-2]


def walk(tree: Params, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every leaf or modulation of a nested dict with its path, in the dict's order.

    Raises:
        ValueError: for a list or tuple, whose kernels would go unseen.
    """
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from walk(value, (*path, key))
        elif type(value) in (list, tuple):
            raise ValueError(
                f"got a {type(value).__name__} at {'.'.join((*path, key))}; expected nested dicts "
                "of arrays; make it a dict, such as {'0': ..., '1': ...}"
            )
        else:
            yield (*path, key), value


def lookup(params: Params, path: tuple[str, ...]) -> Any:
    """What lies at the end of ``path``."""
    for key in path:
        params = params[key]
    return params


def replaced(params: Params, path: tuple[str, ...], value: Any) -> Params:
    """A copy of the dicts along ``path`` with ``value`` at its end."""
    if not path:
        return value
    return {**params, path[0]: replaced(params[path[0]], path[1:], value)}


def find_targets(params: Params, config: SmoaConfig) -> list[Target]:
    """The kernels of ``params`` that ``config`` adapts, in sorted order of path.

    Raises:
        ValueError: if there is none, or if any name, pattern or layer matches nothing.
    """
    kernels, used_views = _kernels(params, config)
    _require_all_used("kernel_views", config.kernel_views, used_views, kernels)
    names = {".".join(path): (path, key, leaf, text) for path, key, leaf, text in kernels}
    chosen = _match("target_modules", config.target_modules, list(names))
    if config.exclude_modules:
        chosen -= _match("exclude_modules", config.exclude_modules, list(names))
    if not chosen:
        raise ValueError(
            f"got target_modules={config.target_modules!r} with exclude_modules="
            f"{config.exclude_modules!r}, which leave no kernel; expected at least one"
        )
    used_patterns: set[str] = set()
    targets = []
    depth = 0  # of the deepest stack among those chosen
    numbers: set[int] = set()  # of the layers that are not stacked
    for name in sorted(chosen):
        path, key, leaf, text = names[name]
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"got a kernel of {leaf.dtype} at {name}; expected floating weights, since a merge "
                "would round the update away; dequantise the base, or exclude the kernel"
            )
        rank = config.rank
        for pattern, value in config.rank_pattern.items():
            if re.fullmatch(pattern, name):
                rank = value
                used_patterns.add(pattern)
                break
        view = view_of(text, len(leaf.shape), name)
        leading = view.matrix_shape(leaf.shape)[:-2]
        depth = max(depth, *leading, 0)
        if not leading:
            numbers |= _layer_number(name)
        selected = _selected_layers(config.layers, name, leading)
        if any(selected):
            ranks = config.subspace_ranks(rank, name)
            target = Target(path, key, tuple(leaf.shape), view, text, rank, ranks, selected)
            targets.append(target)
    _require_all_used("rank_pattern", config.rank_pattern, used_patterns, kernels)
    _check_layers(config.layers, targets, {*range(depth), *numbers})
    for target in targets:
        check_capacity(target, config)
    return targets


def check_capacity(target: Target, config: SmoaConfig) -> None:
    """Refuse a partition or rank that the kernel cannot hold."""
    inputs, outputs = target.matrix_shape[-2:]
    subspaces = config.num_subspaces
    if subspaces > min(inputs, outputs):
        raise ValueError(
            f"got num_subspaces={subspaces} for {target.name}, whose kernel is {inputs} x "
            f"{outputs}; expected at most {min(inputs, outputs)}; lower it or exclude the kernel"
        )
    for subspace, rank in enumerate(target.subspace_ranks):
        block = (inputs, outputs)
        if config.has_blocks:
            block = tuple(
                size // subspaces + (subspace < size % subspaces) for size in (inputs, outputs)
            )
        if rank > min(block):
            raise ValueError(
                f"got rank {rank} for subspace {subspace} of {target.name}, which is {block[0]} x "
                f"{block[1]}; expected at most {min(block)}; lower the rank, or give this kernel "
                "its own in rank_pattern"
            )


def _kernels(params: Params, config: SmoaConfig):
    """Every leaf that could be adapted: (module path, key, leaf, view text)."""
    if not isinstance(params, dict):
        raise ValueError(
            f"got params of type {type(params).__name__}; expected a nested dict of arrays; "
            "unwrap other containers first"
        )
    used: set[str] = set()
    found = []
    for path, leaf in walk(params):
        if is_modulation(leaf):
            raise ValueError(
                f"got params that already hold an adapter ({'.'.join(path)}); expected base "
                "params; merge it first, or start from the base"
            )
        text = ""
        for pattern, view in config.kernel_views.items():
            if re.fullmatch(pattern, ".".join(path)) or re.fullmatch(pattern, ".".join(path[:-1])):
                text = view
                used.add(pattern)
                break
        is_kernel = path[-1] == KERNEL_KEY and len(leaf.shape) >= 2
        if is_kernel or (text and len(leaf.shape) >= 2):
            found.append((path[:-1], path[-1], leaf, text))
    modules = [path for path, *_ in found]
    for path in modules:
        if modules.count(path) > 1:
            raise ValueError(
                f"got two viewed kernels in module {'.'.join(path)}; expected one, since their "
                f"adapter lies beside them under {SMOA_KEY!r}; narrow the pattern in kernel_views"
            )
    return found, used


def _match(field: str, wanted: str | Sequence[str], names: list[str]) -> set[str]:
    if isinstance(wanted, str):
        if wanted == "all-linear":
            return {n for n in names if not _HEADS_AND_EMBEDDINGS & set(n.split("."))}
        chosen = {name for name in names if re.fullmatch(wanted, name)}
        if not chosen:
            raise ValueError(_nothing_matches(field, wanted, names, is_regex=True))
        return chosen
    chosen: set[str] = set()
    for suffix in wanted:
        matched = {name for name in names if name == suffix or name.endswith("." + suffix)}
        if not matched:
            raise ValueError(_nothing_matches(field, suffix, names, is_regex=False))
        chosen |= matched
    return chosen


def _nothing_matches(field: str, pattern: str, names: list[str], *, is_regex: bool) -> str:
    last = {name.rsplit(".", 1)[-1] for name in names}
    if is_regex and any(name.endswith("." + pattern) for name in names):
        listed = f", or a list such as ['{pattern}']" if field.endswith("modules") else ""
        return (
            f"got {field} {pattern!r}, which matches no kernel, since a regular expression must "
            f"match a whole dotted path; expected one such as '.*\\.{pattern}'{listed}"
        )
    near = difflib.get_close_matches(pattern, sorted(last | set(names)), n=3, cutoff=0.4)
    seen = ", ".join(near) if near else ", ".join(sorted(last)[:12]) or "no kernels at all"
    word = "near misses" if near else "kernels there are"
    kinds = "a regular expression for a whole dotted path"
    if field.endswith("modules"):
        kinds = f"the end of a dotted path (in a list), {kinds} (a string) or 'all-linear'"
    return (
        f"got {field} entry {pattern!r}, which matches no kernel; expected {kinds}; {word}: {seen}"
    )


def _require_all_used(field: str, patterns, used: set[str], kernels) -> None:
    for pattern in patterns:
        if pattern not in used:
            names = [".".join(path) for path, *_ in kernels]
            raise ValueError(_nothing_matches(field, pattern, names, is_regex=True))


def _selected_layers(
    layers: tuple[int, ...], name: str, leading: tuple[int, ...]
) -> tuple[bool, ...]:
    """Which layers of a kernel to adapt; an unstacked kernel's index is the number in its path."""
    if not layers:
        return (True,) * (leading[0] if leading else 1)
    if leading:
        return tuple(index in layers for index in range(leading[0]))
    return (_layer_number(name) <= set(layers),)


def _layer_number(name: str) -> set[int]:
    """The index of an unstacked layer, if the path holds a number."""
    return {int(number) for number in re.findall(r"(?:^|[._])(\d+)(?=\.|$)", name)[:1]}


def _check_layers(layers: tuple[int, ...], targets: list[Target], known: set[int]) -> None:
    if not layers:
        return
    unknown = [layer for layer in layers if layer not in known]
    if known and unknown:
        raise ValueError(
            f"got layers={layers}, of which {', '.join(map(str, unknown))} is no layer of the "
            f"targeted kernels; expected indices from {min(known)} to {max(known)}"
        )
    if unknown or not targets:
        raise ValueError(
            f"got layers={layers}, which select no layer; expected indices of existing layers"
        )
