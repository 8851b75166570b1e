"""Stock PEFT gives our adapted model's logits from what we export, and not the base's."""

from __future__ import annotations

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smoa_jax import SmoaConfig, apply_smoa, merge_smoa
from smoa_jax.adapter.tree import find_modulations
from smoa_jax.adapter.types import Blocks
from smoa_jax.checkpoint.base import load_base
from smoa_jax.checkpoint.names import layer_numbers
from smoa_jax.checkpoint.peft.export import export_peft
from smoa_jax.checkpoint.peft.load import import_peft
from smoa_jax.checkpoint.peft.names import module_naming
from smoa_jax.models.decoder import Decoder
from tests.parity import peft_models
from tests.parity import test_checkpoint_gemma as gemma
from tests.parity import test_checkpoint_gemma4 as gemma4
from tests.parity import test_checkpoint_neighbours as neighbours
from tests.parity.peft_models import TOKENS, peft_logits, write_llama

pytestmark = pytest.mark.parity

PATTERN = {r".*\.down_proj": 9, r".*\.q_proj": 4}

CONFIGS = {
    "lora": SmoaConfig.lora(6),
    "lora_alpha": SmoaConfig.lora(6, alpha=15.0, rank_pattern=PATTERN, dropout=0.1),
    "lora_rank_stabilised": SmoaConfig.lora(6, scaling="alpha/sqrt(r)", rank_pattern=PATTERN),
    "melora": SmoaConfig.melora(6, 3),
    "additive_spectral_blocks": SmoaConfig(rank=5, modulation="none"),
    "hira": SmoaConfig.hira(6),
    "hira_alpha_rank_pattern": SmoaConfig.hira(6, alpha=3.0, rank_pattern=PATTERN),
    "two_blocks": SmoaConfig(rank=6),
    "three_blocks_of_unequal_ranks": SmoaConfig(rank=9, num_subspaces=3, ranks=(1, 3, 5)),
    "blocks_rank_pattern_one_layer": SmoaConfig(
        rank=6, rank_pattern=PATTERN, layers=(1,), scaling="alpha/sqrt(r)"
    ),
    "random_blocks_two_layers": SmoaConfig(rank=6, partition="random_blocks", layers=(0, 2)),
    "same_name_elsewhere": SmoaConfig(
        rank=6, target_modules=r".*attn\.(q|o)_proj|.*\.mlp\.up_proj"
    ),
    "head": SmoaConfig.lora(4, alpha=8.0, target_modules=["lm_head", "q_proj"]),
    "head_and_one_layer": SmoaConfig.hira(4, layers=(1,), target_modules=["lm_head", "up_proj"]),
    "melora_last_layer": SmoaConfig.melora(6, 2, layers=(2,), target_modules="all-linear"),
}
#: Those whose adapted model runs unmerged, each another program to compile.
ADAPTED_FORWARD = ("lora_alpha", "melora", "hira", "three_blocks_of_unequal_ranks")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def forward(checkpoint):
    base = load_base(checkpoint)
    apply = jax.jit(Decoder(base.config, dtype=jnp.float32).apply)
    return base, lambda params: np.asarray(apply({"params": params}, jnp.asarray(TOKENS)))


def trained(params):
    """Random values where training would put some: not in the padding, nor in layers left out."""
    key = jax.random.key(7)

    def draw(leaf, used, salt):
        own = jax.random.fold_in(key, salt)
        return jnp.where(used, 0.3 * jax.random.normal(own, leaf.shape), 0)

    for salt, (path, node, _) in enumerate(find_modulations(params).values()):
        columns = np.arange(node.a.shape[-1])
        used = columns < np.asarray(node.ranks)[..., None]  # (L, M, R_m)
        used_a = used_b = used
        if isinstance(node, Blocks):
            used_a, used_b = (
                np.take_along_axis(used, np.asarray(block, int)[..., None], axis=1)
                for block in (node.in_block, node.out_block)
            )
        fields = {"a": draw(node.a, used_a, 2 * salt), "b": draw(node.b, used_b, 2 * salt + 1)}
        module = params
        for name in path:
            module = module[name]
        module["smoa"] = type(node)(**{**vars(node), **fields})
    return params


def copied(tree):
    return {key: copied(value) if isinstance(value, dict) else value for key, value in tree.items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_peft_gives_the_adapted_logits(checkpoint, forward, tmp_path, name, recwarn):
    """Merged weights for most, since they share one compiled program; see ADAPTED_FORWARD."""
    config = CONFIGS[name]
    base, logits = forward
    params = trained(copied(apply_smoa(base.params, config, jax.random.key(1))))
    directory = export_peft(params, config, tmp_path / "peft", base_model_name=str(checkpoint))
    adapted = params if name in ADAPTED_FORWARD else merge_smoa(params)
    ours, plain = logits(adapted), logits(base.params)
    theirs, num_adapted = peft_logits(checkpoint, directory)
    assert np.abs(theirs - ours).max() < 1e-4
    assert np.abs(theirs - plain).max() > 0.1
    expected = sum(
        int((np.asarray(node.ranks).sum(-1) > 0).sum())
        for _, node, _ in find_modulations(params).values()
    )
    assert num_adapted == expected
    messages = [str(warning.message) for warning in recwarn]
    assert not [text for text in messages if "missing" in text or "unexpected" in text.lower()]
    written = json.loads((directory / "adapter_config.json").read_text())
    assert written["peft_type"] == ("HIRA" if config.modulation == "weight" else "LORA")


def adapter_logits(base, params):
    """With the adapter, and without."""
    apply = jax.jit(Decoder(base.config, dtype=jnp.float32).apply)
    return [
        np.asarray(apply({"params": tree}, jnp.asarray(TOKENS))) for tree in (params, base.params)
    ]


@pytest.mark.parametrize(
    "config", [CONFIGS["two_blocks"], CONFIGS["melora"]], ids=["smoa", "melora"]
)
@pytest.mark.parametrize("kind", ["e2b", "31b", "layers", "multimodal"])
def test_peft_opens_the_adapter_of_a_gemma4(tmp_path, kind, config, monkeypatch):
    """Of every stack, of some layers alone, and of the text part of a multimodal one."""
    for module in (peft_models, sys.modules[__name__]):  # none of the images' and sounds' tokens
        monkeypatch.setattr(module, "TOKENS", TOKENS % 88)
    made = (
        gemma4.multimodal_model(unified=False)
        if kind == "multimodal"
        else gemma4.torch_model("31b" if kind == "layers" else kind)
    )
    made.save_pretrained(tmp_path / "base")
    base = load_base(tmp_path / "base")
    config = dataclasses.replace(
        config,
        layers=(1, 3, 6) if kind == "layers" else (),
        layer_numbers=layer_numbers(base.config),
    )
    params = trained(copied(apply_smoa(base.params, config, jax.random.key(1))))
    naming = module_naming(base.hf_config)
    directory = export_peft(
        params, config, tmp_path / "peft", base_model_name="tiny", hf_module_name=naming
    )
    ours, plain = adapter_logits(base, params)
    theirs, num_adapted = peft_logits(tmp_path / "base", directory)
    assert np.abs(theirs - ours).max() < 1e-4
    assert np.abs(theirs - plain).max() > 0.1
    expected = {"e2b": 15 * 3 + 9 * 2, "31b": 8 * 4 + 6, "layers": 3 * 4 + 2}
    expected["multimodal"] = expected["e2b"]
    assert num_adapted == expected[kind]  # global layers of a 31B have no v_proj, nor shared ones k
    back, found = import_peft(
        directory,
        base.params,
        hf_module_name=naming,
        layer_numbers=layer_numbers(base.config),
    )
    assert found.layers == config.layers
    np.testing.assert_allclose(adapter_logits(base, back)[0], ours, atol=1e-4)


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3", *neighbours.NEIGHBOURS])
@pytest.mark.parametrize(
    "config", [CONFIGS["two_blocks"], CONFIGS["melora"]], ids=["smoa", "melora"]
)
def test_peft_opens_the_adapter_of_each_family(tmp_path, family, config):
    made = gemma.torch_model if family in gemma.CLASSES else neighbours.torch_model
    made(family).save_pretrained(tmp_path / "base")
    base = load_base(tmp_path / "base")
    params = trained(copied(apply_smoa(base.params, config, jax.random.key(1))))
    directory = export_peft(params, config, tmp_path / "peft", base_model_name=family)
    ours, plain = adapter_logits(base, params)
    theirs, num_adapted = peft_logits(tmp_path / "base", directory)
    assert np.abs(theirs - ours).max() < 1e-4
    assert np.abs(theirs - plain).max() > 0.1
    assert num_adapted == 5 * base.config.num_layers
