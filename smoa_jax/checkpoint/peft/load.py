"""A LoRA or HiRA adapter of PEFT onto a base, as if ``apply_smoa`` had made it and we trained it.

| there                                      | here                                         |
|--------------------------------------------|----------------------------------------------|
| LoRA: ``lora_A`` (r, I), ``lora_B`` (O, r) | ``LowRank``, a = A^T, b = B                  |
| HiRA: ``hira_A``, ``hira_B``               | the same, weight-modulated, s = 1            |

Ranks are those of the tensors: ``rank_pattern`` says what was asked for, not always what was made.
PEFT lets rank, alpha and the choice of layers differ from module to module. Here a kernel has one
rank and one scale over the layers of its stack, and all stacks share one choice of layers. Where
PEFT's adapter has more freedom than that, the function it computes is kept exactly:

- a module of a smaller rank gets columns of zeros in both factors, a layer that only other kernels
  adapt gets nothing but zeros; both stay zero in training, since each factor's gradient is a
  multiple of the other;
- a scale that the config can't express is folded into b.

So the returned config describes the tree, and both can be saved, loaded, trained on and exported.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np

from smoa_jax import checks
from smoa_jax.adapter.config import SmoaConfig
from smoa_jax.adapter.targets import KERNEL_KEY, find_targets, lookup, stacked_layers, walk
from smoa_jax.adapter.types import Params, is_modulation
from smoa_jax.checkpoint.errors import CheckpointError, listed, require
from smoa_jax.checkpoint.huggingface.directory import download, is_hub_name
from smoa_jax.checkpoint.huggingface.safetensors_files import SafetensorsFiles
from smoa_jax.checkpoint.names import TreePath
from smoa_jax.checkpoint.native.leaves import Leaves, restore_adapter
from smoa_jax.checkpoint.peft.config import WAY_OUT, PeftSettings, read_peft_config
from smoa_jax.checkpoint.peft.names import (
    PEFT_PREFIX,
    TENSORS_FILE,
    ModuleName,
    decoder_module_name,
    parse_factor,
    plain_module_name,
)
from smoa_jax.storage import local_copy

_PICKLE = "adapter_model.bin"
_WEIGHT_SUFFIXES = (".base_layer.weight", ".weight")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Module:
    """One adapted linear layer in float32: its update is ``scale * a b^T``, or that times W."""

    a: np.ndarray  # (I, r)
    b: np.ndarray  # (O, r)
    scale: float


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a weight of the Hugging Face model lies in the base tree."""

    path: TreePath  # of the array
    layer: int | None
    array: Any

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """``(I, O)`` of a kernel."""
        return tuple(self.array.shape[-2:])


#: By the path of a module in the tree, then by layer.
_Modules: TypeAlias = dict[TreePath, dict[int | None, _Module]]


def import_peft(
    directory: str | Path,
    base_params: Params,
    *,
    hf_module_name: ModuleName = decoder_module_name,
    layer_numbers: Mapping[str, tuple[int, ...]] | None = None,
) -> tuple[Params, SmoaConfig]:
    """Put an adapter that PEFT wrote onto its base.

    >>> params, config = import_peft("peft-adapter", base.params)
    >>> save_adapter(params, config, "adapter", base_fingerprint=base.fingerprint,
    ...              base_name="SmolLM2-135M-Instruct")

    PEFT's files don't say which weights they were trained on: whether they fit ``base_params`` is
    known by the shapes alone.

    Args:
        directory: With ``adapter_config.json`` and ``adapter_model.safetensors``, or
            ``organisation/adapter`` on the hub.
        base_params: The base model's tree. The adapter's tensors lie on JAX's default device.
        hf_module_name: Names of the modules, as ``export_peft`` takes it. The names of the text
            part of a multimodal model are understood too.
        layer_numbers: As ``SmoaConfig`` has it, for a base of several stacks.

    Returns:
        The adapted tree, and a config that describes it: one that ``apply_smoa`` would make the
        same tree from, but for the values of the factors.

    Raises:
        CheckpointError: for a pickle, for anything but plain LoRA or HiRA on linear layers, or for
            an adapter that doesn't fit the base.
    """
    source = local_copy(directory)
    if not source.exists() and isinstance(directory, str) and is_hub_name(directory):
        source = download(directory, weights=True)
    settings = read_peft_config(source)
    tensors = _open_tensors(source)
    places = _places(base_params, hf_module_name)
    modules = _read_modules(tensors, settings, places)
    config = _describe(modules, settings, base_params, layer_numbers or {})
    try:
        leaves = _leaves(modules, config, base_params)
        return restore_adapter(base_params, config, leaves), config
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}") from error


# ----------------------------------------------------------------------------------- the tensors


def _open_tensors(source: Path) -> SafetensorsFiles:
    path = source / TENSORS_FILE
    if path.is_file():
        return SafetensorsFiles(str(source), [path])
    require(
        not (source / _PICKLE).is_file(),
        "a pickle, which can run code when opened",
        f"{TENSORS_FILE}",
        "load the adapter in PEFT and save_pretrained it again",
        where=source / _PICKLE,
    )
    raise CheckpointError(f"{source}: no {TENSORS_FILE} in it; expected one: copy it again")


def _places(base_params: Params, hf_module_name: ModuleName) -> dict[str, _Place]:
    """The weights of the base by the names of their modules in a plain decoder."""
    places = {}
    for path, array in walk(base_params):
        if is_modulation(array):  # an error, later and in the adapter's own words
            continue
        stacked = path[-1] == KERNEL_KEY and len(array.shape) == 3
        for layer in range(array.shape[0]) if stacked else (None,):
            try:
                name = plain_module_name(hf_module_name(path[:-1], layer))
            except (ValueError, KeyError):  # a module that the caller has no name for
                break
            places[name] = _Place(path, layer, array)
    return places


def _read_modules(
    tensors: SafetensorsFiles, settings: PeftSettings, places: Mapping[str, _Place]
) -> _Modules:
    factors: dict[str, dict[str, str]] = collections.defaultdict(dict)  # module -> "A" -> tensor
    unknown, adapters = [], set()
    for name in tensors.tensors:
        parts = parse_factor(name)
        if parts is None or parts.kind != settings.kind:
            if not _is_base_weight(tensors, name, places):
                unknown.append(name)
            continue
        adapters.add(parts.adapter)
        factors[parts.module][parts.factor] = name
    require(
        len(adapters) <= 1,
        f"the adapters {listed(sorted(adapters))} in one file",
        "one",
        "save each in PEFT on its own",
        where=tensors.source,
    )
    require(
        bool(factors), f"no {settings.kind} factors", "some", "copy it again", where=tensors.source
    )
    modules: _Modules = collections.defaultdict(dict)
    for name, pair in factors.items():
        place = places.get(plain_module_name(name))
        if place is None or place.path[-1] != KERNEL_KEY:
            checks.refuse(
                f"an adapter on {name}",
                "one of this base's linear layers (a tied head is none)",
                "name the base that it was trained on",
                where=tensors.source,
                error=CheckpointError,
            )
        modules[place.path[:-1]][place.layer] = _read_module(tensors, settings, name, pair, place)
    require(
        not unknown,
        f"{listed(unknown)}",
        f"the two {settings.kind} factors of linear layers alone, no embeddings, biases, "
        f"magnitudes or weights other than the base's: {WAY_OUT}",
        where=tensors.source,
    )
    return modules


def _read_module(
    tensors: SafetensorsFiles,
    settings: PeftSettings,
    name: str,
    pair: Mapping[str, str],
    place: _Place,
) -> _Module:
    inputs, outputs = place.matrix_shape
    shapes = {key: tensors.tensors[pair[key]].shape for key in sorted(pair)}
    rank = next((shape[0] for key, shape in shapes.items() if key == "A" and shape), 0)
    if not rank or shapes != {"A": (rank, inputs), "B": (outputs, rank)}:
        got = " and ".join(f"{key} {shape}" for key, shape in shapes.items())
        raise CheckpointError(
            f"{tensors.source}: got factors of {name} of shapes {got}; expected A (r, {inputs}) "
            f"and B ({outputs}, r): name the base that it was trained on, or save the adapter whole"
        )
    everything = (slice(None), slice(None))
    a, b = (tensors.read(pair[key], everything).astype(np.float32) for key in "AB")
    a = a.T
    if rank > min(inputs, outputs):  # more columns than the product has rank
        product = a @ b.T
        if outputs <= inputs:
            a, b = product, np.eye(outputs, dtype=np.float32)
        else:
            a, b = np.eye(inputs, dtype=np.float32), product.T
    return _Module(a=a, b=b, scale=settings.scale(name, rank))


def _is_base_weight(tensors: SafetensorsFiles, name: str, places: Mapping[str, _Place]) -> bool:
    """Whether a tensor repeats a weight of the base, as PEFT stores it beside an adapted head."""
    module = name.removeprefix(PEFT_PREFIX)
    suffix = next((end for end in _WEIGHT_SUFFIXES if module.endswith(end)), "")
    place = places.get(plain_module_name(module.removesuffix(suffix)))
    if not suffix or place is None or place.layer is not None:
        return False
    shape = tuple(place.array.shape)
    is_kernel = place.path[-1] == KERNEL_KEY
    if tensors.tensors[name].shape != (shape[::-1] if is_kernel else shape):
        return False
    stored = tensors.read(name, (slice(None),) * len(shape))
    ours = np.asarray(place.array)
    coarser = min(stored.dtype, ours.dtype, key=lambda dtype: dtype.itemsize)
    stored = stored.T if is_kernel else stored
    return bool(np.array_equal(stored.astype(coarser), ours.astype(coarser)))


# ------------------------------------------------------------------------------------ the config


def _describe(
    modules: _Modules,
    settings: PeftSettings,
    base_params: Params,
    layer_numbers: Mapping[str, tuple[int, ...]],
) -> SmoaConfig:
    """The config of the smallest adapter of ours that holds all of ``modules``."""
    ranks = {
        ".".join(path): max(module.a.shape[1] for module in layers.values())
        for path, layers in modules.items()
    }
    rank = collections.Counter(ranks.values()).most_common(1)[0][0]
    known: set[int] = set()
    stacked: set[int] = set()
    for path, layers in modules.items():
        shape = lookup(base_params, path)[KERNEL_KEY].shape
        if len(shape) == 3:
            numbers = stacked_layers(layer_numbers, ".".join(path), shape[0])
            known.update(numbers)
            stacked.update(numbers[layer] for layer in layers if layer is not None)
    fields: dict[str, Any] = {
        "target_modules": _targets(modules, base_params),
        "rank_pattern": {re.escape(name): value for name, value in ranks.items() if value != rank},
        "layers": tuple(sorted(stacked)) if stacked < known else (),
        "layer_numbers": layer_numbers,
        "dropout": settings.dropout,
    }
    if settings.kind == "hira":
        return SmoaConfig.hira(rank, **fields)
    fields["scaling"] = settings.scaling
    alphas = [settings.alpha, *settings.alpha_pattern.values()]
    alphas = [alpha for alpha in dict.fromkeys(alphas) if alpha > 0]
    candidates = [SmoaConfig.lora(rank, alpha=alpha, **fields) for alpha in (*alphas, None)]

    def num_folded(config: SmoaConfig) -> int:
        return sum(
            _folded(module, config.scale(ranks[".".join(path)])) != 1.0
            for path, layers in modules.items()
            for module in layers.values()
        )

    return min(candidates, key=num_folded)


def _targets(modules: _Modules, base_params: Params) -> tuple[str, ...]:
    """The adapted kernels by last names, or by whole ones where others end alike."""
    others = {path[:-1] for path, _ in walk(base_params) if path[-1] == KERNEL_KEY} - set(modules)
    ambiguous = {path[-1] for path in others}
    names = {".".join(path) if path[-1] in ambiguous else path[-1] for path in modules}
    return tuple(sorted(names))


def _leaves(modules: _Modules, config: SmoaConfig, base_params: Params) -> Leaves:
    """The modulations' leaves, as ``restore_adapter`` takes them."""
    leaves: Leaves = {}
    for target in find_targets(base_params, config):
        inputs, outputs = target.matrix_shape[-2:]
        selected = np.asarray(target.selected, np.float32)
        scale = config.scale(target.rank)
        a = np.zeros((len(selected), inputs, target.rank), np.float32)
        b = np.zeros((len(selected), outputs, target.rank), np.float32)
        for layer, module in modules[target.path].items():
            used = module.a.shape[1]
            a[layer or 0, :, :used] = module.a
            b[layer or 0, :, :used] = module.b * np.float32(_folded(module, scale))
        stacks = {
            "a": a,
            "b": b,
            "scale": selected * np.float32(scale),
            "ranks": selected[:, None] * np.float32(target.rank),
        }
        for field, stack in stacks.items():
            name = "/".join((*target.path, field))
            leaves[name] = jnp.asarray(stack if target.leading else stack[0])
    return leaves


def _folded(module: _Module, scale: float) -> float:
    """What b has to be multiplied by for the config's scale to do what the module's own does."""
    ratio = module.scale / scale
    return 1.0 if abs(ratio - 1.0) < 1e-6 else ratio
