"""What PEFT wrote computes the same here, and again in PEFT after a round trip."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smoa_jax import merge_smoa
from smoa_jax.adapter.tree import find_modulations
from smoa_jax.checkpoint.adapter_files import load_adapter, read_adapter_config, save_adapter
from smoa_jax.checkpoint.base import load_base
from smoa_jax.checkpoint.peft_files import export_peft
from smoa_jax.checkpoint.peft_import import import_peft
from smoa_jax.checkpoint.peft_names import decoder_module_name
from smoa_jax.models.config import DecoderConfig
from smoa_jax.models.decoder import Decoder
from smoa_jax.models.params import init_params
from tests.parity.peft_models import (
    TOKENS,
    load_llama,
    logits_of,
    peft,
    peft_logits,
    torch,
    transformers,
    write_adapter,
    write_llama,
)

pytestmark = pytest.mark.parity

FIVE = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]


def lora(**fields):
    return peft.LoraConfig(**{"r": 6, "lora_alpha": 15, "target_modules": FIVE, **fields})


def hira(**fields):
    return peft.HiraConfig(**{"r": 6, "target_modules": FIVE, **fields})


#: PEFT's config, and fields of the config that must come of it.
CASES = {
    "lora": (lora(), {"rank": 6, "alpha": 15.0, "rank_pattern": {}, "layers": ()}),
    "lora_patterns_by_kernel": (
        lora(
            lora_alpha=12,
            rank_pattern={"down_proj": 9, "q_proj": 4},
            alpha_pattern={"mlp.up_proj": 5, "q_proj": 3},
        ),
        {
            "alpha": 12.0,
            "rank_pattern": {r"layers\.mlp\.down_proj": 9, r"layers\.self_attn\.q_proj": 4},
        },
    ),
    "lora_patterns_by_layer": (
        lora(
            rank_pattern={"layers.0.self_attn.q_proj": 2, r".*\.2\.mlp\.down_proj": 9},
            alpha_pattern={r"model\.layers\.1\..*": 20, "layers.2.mlp.up_proj": 7},
        ),
        {"rank": 6, "rank_pattern": {r"layers\.mlp\.down_proj": 9}},
    ),
    "lora_rank_stabilised": (
        lora(use_rslora=True, rank_pattern={"v_proj": 3}, alpha_pattern={"v_proj": 4}),
        {"scaling": "alpha/sqrt(r)", "alpha": 15.0},
    ),
    "lora_alpha_equal_to_each_rank": (
        lora(rank_pattern={"v_proj": 3}, alpha_pattern={"v_proj": 3}, lora_alpha=6),
        {"alpha": None},
    ),
    "lora_two_layers": (lora(layers_to_transform=[0, 2]), {"layers": (0, 2)}),
    "lora_layers_by_kernel": (
        lora(target_modules=r".*layers\.0\.self_attn\.q_proj|.*layers\.[02]\.mlp\.up_proj"),
        {"layers": (0, 2), "target_modules": ("q_proj", "up_proj")},
    ),
    "lora_rank_beyond_the_kernel": (
        lora(r=30, target_modules=["k_proj", "q_proj", "v_proj"]),
        {"rank": 24, "rank_pattern": {r"layers\.self_attn\.q_proj": 30}},
    ),
    "lora_with_the_head": (lora(target_modules=["lm_head", "o_proj"]), {"layers": ()}),
    "lora_all_linear_dropout": (
        lora(target_modules="all-linear", lora_dropout=0.25),
        {"dropout": 0.25},
    ),
    "hira": (hira(), {"rank": 6, "alpha": None, "modulation": "weight"}),
    "hira_whose_rank_pattern_peft_ignored": (
        hira(rank_pattern={"down_proj": 9, "q_proj": 3}, hira_dropout=0.5),
        {"rank": 6, "rank_pattern": {}, "dropout": 0.5},
    ),
    "hira_last_layer": (hira(layers_to_transform=2), {"layers": (2,)}),
}
#: Those whose adapted model runs unmerged, each another program to compile.
ADAPTED_FORWARD = ("lora_patterns_by_layer", "hira")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def forward(checkpoint):
    base = load_base(checkpoint)
    apply = jax.jit(Decoder(base.config, dtype=jnp.float32).apply)
    return base, lambda params: np.asarray(apply({"params": params}, jnp.asarray(TOKENS)))


@pytest.mark.parametrize("name", CASES)
def test_an_adapter_of_peft_gives_its_logits_here_and_again_there(
    checkpoint, forward, tmp_path, name
):
    base, logits = forward
    theirs = logits_of(write_adapter(load_llama(checkpoint), CASES[name][0], tmp_path / "peft"))
    params, config = import_peft(tmp_path / "peft", base.params)
    assert {key: getattr(config, key) for key in CASES[name][1]} == CASES[name][1]
    ours = logits(params if name in ADAPTED_FORWARD else merge_smoa(params))
    assert np.abs(theirs - ours).max() < 1e-4
    assert np.abs(theirs - logits(base.params)).max() > 0.1

    where = {"base_fingerprint": base.fingerprint}
    save_adapter(params, config, tmp_path / "ours", base_name="tiny", **where)
    assert read_adapter_config(tmp_path / "ours") == config
    again = load_adapter(tmp_path / "ours", base.params, **where)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, again, params)

    export_peft(again, config, tmp_path / "back", base_model_name=str(checkpoint))
    assert np.abs(peft_logits(checkpoint, tmp_path / "back")[0] - theirs).max() < 1e-4


# -------------------------------------------------------------------- one part of a larger model

TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
TEXT_DECODER = DecoderConfig(
    vocab_size=64,
    embed_dim=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=48,
    rope_base=1e4,
    norm_epsilon=1e-6,
    tie_embeddings=True,
    max_positions=64,
)
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def multimodal():
    """A Gemma 3 whose vision tower has modules named q_proj, k_proj and v_proj too."""
    torch.manual_seed(0)
    config = transformers.Gemma3Config(text_config=TEXT, vision_config=VISION)
    return transformers.Gemma3ForConditionalGeneration(config).eval()


def factors_of(model):
    """Every factor that is not at its neutral start, by the module's name."""
    return {
        name: value.numpy()
        for name, value in peft.get_peft_model_state_dict(model).items()
        if not name.endswith("lora_B.weight") or value.any()
    }


def test_the_text_part_of_a_multimodal_model_is_met_by_its_own_names(tmp_path):
    text_only = r"model\.language_model\..*\.(q_proj|v_proj|down_proj)"
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=text_only)
    written = factors_of(write_adapter(multimodal(), config, tmp_path / "peft"))
    base = init_params(TEXT_DECODER, jax.random.key(0))
    params, ours = import_peft(tmp_path / "peft", base)
    assert sorted(ours.target_modules) == ["down_proj", "q_proj", "v_proj"]
    for path, node, _ in find_modulations(params).values():
        for layer in range(2):
            prefix = ".".join(path).replace("layers", f"model.language_model.layers.{layer}")
            for factor, stack in (("A", node.a), ("B", np.swapaxes(node.b, 1, 2))):
                expected = written[f"base_model.model.{prefix}.lora_{factor}.weight"]
                np.testing.assert_array_equal(stack[layer].T, expected)

    where = functools.partial(decoder_module_name, text_model="model.language_model")
    export_peft(params, ours, tmp_path / "back", base_model_name="tiny", hf_module_name=where)
    opened = peft.PeftModel.from_pretrained(multimodal(), tmp_path / "back")
    adapted = [name for name, _ in opened.named_modules() if name.endswith("base_layer")]
    assert len(adapted) == 6
    assert not [name for name in adapted if re.search("vision", name)]
    again = factors_of(opened)
    assert again.keys() == written.keys()
    for name, value in written.items():
        np.testing.assert_array_equal(again[name], value)
