"""Gemma's ``config.json`` in the forms that its makers and two majors of transformers write."""

from __future__ import annotations

import dataclasses

import pytest

from smoa_jax.checkpoint.errors import CheckpointError
from smoa_jax.checkpoint.huggingface.config import config_from_hf, config_to_hf
from smoa_jax.models.config import RopeScaling

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 7,
    "num_key_value_heads": 2,
}
GEMMA = {**SIZES, "model_type": "gemma", "head_dim": 16, "vocab_size": 64}
GEMMA2 = {**GEMMA, "model_type": "gemma2", "query_pre_attn_scalar": 144, "sliding_window": 8}
GEMMA3 = {**GEMMA, "model_type": "gemma3_text", "sliding_window": 8}
LOCAL, GLOBAL = "sliding_attention", "full_attention"


def test_gemma_1_as_google_wrote_it():
    config = config_from_hf({**GEMMA, "hidden_act": "gelu", "hidden_activation": None})
    assert (config.activation, config.norm_offset) == ("gelu_tanh", 1.0)
    assert config.embed_scale == 32**0.5
    assert config.attention_scale == 0.25
    assert config.tie_embeddings
    assert (config.post_norms, config.qk_norm, config.local_layers) == (False, False, ())


def test_gemma_2_has_every_other_layer_local_and_both_caps():
    config = config_from_hf(GEMMA2)
    assert config.local_layers == (True, False, True, False, True, False, True)
    assert (config.attention_soft_cap, config.final_soft_cap) == (50.0, 30.0)
    assert config.attention_scale == pytest.approx(1 / 12)
    assert (config.rope_base, config.local_rope_base) == (10000.0, 0.0)


def test_a_null_switches_a_cap_off_where_silence_means_the_default():
    config = config_from_hf({**GEMMA2, "attn_logit_softcapping": None})
    assert (config.attention_soft_cap, config.final_soft_cap) == (0.0, 30.0)


def test_gemma_3_has_every_sixth_layer_global_and_two_rotary_bases():
    config = config_from_hf(GEMMA3)
    assert config.local_layers == (True,) * 5 + (False, True)
    assert (config.rope_base, config.local_rope_base) == (1e6, 1e4)
    assert (config.attention_soft_cap, config.final_soft_cap) == (0.0, 0.0)
    assert config.qk_norm


@pytest.mark.parametrize(
    "rope",
    [
        {
            "rope_theta": 5e5,
            "rope_local_base_freq": 300,
            "rope_scaling": {"type": "linear", "factor": 8},
        },
        {
            "rope_parameters": {
                GLOBAL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
                LOCAL: {"rope_type": "default", "rope_theta": 300.0},
            }
        },
    ],
    ids=["older", "newer"],
)
def test_both_forms_of_gemma_3_rotary_fields_mean_the_same(rope):
    config = config_from_hf({**GEMMA3, **rope})
    assert (config.rope_base, config.local_rope_base) == (5e5, 300.0)
    assert config.rope_scaling == RopeScaling(kind="linear", factor=8.0)


@pytest.mark.parametrize("pattern", ["sliding_window_pattern", "_sliding_window_pattern"])
def test_a_pattern_says_which_layers_are_global_unless_they_are_listed(pattern):
    config = config_from_hf({**GEMMA3, pattern: 2})
    assert config.local_layers == (True, False) * 3 + (True,)
    listed = config_from_hf({**GEMMA3, pattern: 2, "layer_types": [LOCAL] + [GLOBAL] * 6})
    assert listed.local_layers == (True,) + (False,) * 6


def test_a_gemma_3_whose_layers_are_all_global_has_no_window():
    config = config_from_hf({**GEMMA3, "layer_types": [GLOBAL] * 7})
    assert (config.local_layers, config.sliding_window, config.local_rope_base) == ((), 0, 0.0)


def test_the_text_part_of_a_multimodal_config_fills_in_what_google_leaves_out():
    fields = {
        "model_type": "gemma3",
        "text_config": {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "model_type": "gemma3_text",
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "vision_config": {"hidden_size": 1152},
        "torch_dtype": "bfloat16",
    }
    config = config_from_hf(fields)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (8, 4, 256)
    assert (config.vocab_size, config.max_positions) == (262_208, 131_072)
    assert config.rope_scaling.factor == 8.0
    written = config_to_hf(config, fields, dtype="float32")
    assert written == {**fields, "torch_dtype": "float32"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({**GEMMA3, "attn_logit_softcapping": 50.0}, r"attn_logit_softcapping is 50\.0; expected"),
        ({**GEMMA3, "use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ({**GEMMA3, "attention_bias": True}, "attention_bias is True"),
        ({**GEMMA2, "enable_moe_block": True}, "enable_moe_block is True"),
        ({**GEMMA2, "hidden_activation": "silu"}, "hidden_activation 'silu'"),
        ({**GEMMA, "hidden_act": "relu"}, "hidden_act 'relu'"),
        ({**GEMMA2, "layer_types": [LOCAL]}, r"layer_types .*each of 7 layers"),
        ({**GEMMA2, "layer_types": ["chunked_attention"] * 7}, "layer_types"),
        ({**GEMMA2, "sliding_window": None}, "sliding_window is"),
        (
            {**GEMMA3, "rope_parameters": {LOCAL: {"rope_type": "linear", "factor": 2.0}}},
            "expected rope_type default, as every Gemma 3 has",
        ),
        ({**GEMMA3, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type 'yarn'"),
        ({"model_type": "gemma3", "text_config": None}, "text_config None; expected an object"),
        (
            {"model_type": "gemma3", "text_config": GEMMA2},
            "text_config of model_type 'gemma2'; expected gemma3_text",
        ),
        (
            {
                "model_type": "gemma3",
                "tie_word_embeddings": False,
                "text_config": {**GEMMA3, "tie_word_embeddings": True},
            },
            "expected the same in both",
        ),
        (
            {"model_type": "gemma3n", "text_config": {}},
            r"model_type 'gemma3n' \(Gemma 3n, .*\); expected one of llama",
        ),
    ],
)
def test_what_would_be_another_function_is_one_clear_line(fields, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        config_from_hf(fields, "there/config.json")
    assert str(caught.value).startswith("there/config.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fields", [GEMMA, GEMMA2, GEMMA3], ids=["gemma", "gemma2", "gemma3"])
def test_config_survives_the_way_there_and_back(fields):
    for extra in ({}, {"layer_types": [GLOBAL, LOCAL] * 3 + [GLOBAL]}):
        config = config_from_hf({**fields, "final_logit_softcapping": None, **extra})
        written = config_to_hf(config, dtype="bfloat16")
        assert written["model_type"] == fields["model_type"]
        again = config_from_hf(written)
        assert dataclasses.replace(again, query_scale=0.0) == dataclasses.replace(
            config, query_scale=0.0
        )
        assert again.attention_scale == pytest.approx(config.attention_scale, rel=1e-12)


def test_options_that_no_model_type_has_together_are_refused():
    mixed = dataclasses.replace(config_from_hf(GEMMA3), attention_soft_cap=5.0)
    with pytest.raises(ValueError, match=r"attention_soft_cap no gemma3_text has"):
        config_to_hf(mixed, dtype="float32")
