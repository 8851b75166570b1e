"""``config.json`` of Llama's neighbours: what it says, what it leaves out, what is refused."""

from __future__ import annotations

import dataclasses

import pytest

from smoa_jax.checkpoint.errors import CheckpointError
from smoa_jax.checkpoint.huggingface.config import config_from_hf, config_to_hf
from smoa_jax.checkpoint.huggingface.families import FAMILIES

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 8,
    "num_hidden_layers": 7,
}
NEIGHBOURS = ("mistral", "qwen2", "qwen3", "smollm3", "olmo2")
LOCAL, GLOBAL = "sliding_attention", "full_attention"


def read(model_type: str, **fields):
    return config_from_hf({**SIZES, "model_type": model_type, **fields}, "there/config.json")


def local_layers(**fields) -> list[int]:
    return [layer for layer, local in enumerate(read(**fields).local_layers) if local]


def test_silence_means_what_transformers_takes_it_for():
    mistral, qwen2, qwen3, smollm3 = (
        read(name, num_key_value_heads=4) for name in ("mistral", "qwen2", "qwen3", "smollm3")
    )
    assert (mistral.sliding_window, mistral.local_layers) == (4096, (True,) * 7)
    assert read("mistral").num_kv_heads == 8
    assert (qwen2.attention_bias, qwen2.local_layers) == ("qkv", ())
    assert (qwen2.head_dim, qwen3.head_dim) == (4, 128)
    assert (qwen3.attention_bias, qwen3.qk_norm, qwen3.wide_qk_norm) == ("none", True, False)
    assert (smollm3.rope_base, smollm3.tie_embeddings) == (2e6, True)
    assert smollm3.rope_layers == (True, True, True, False, True, True, True)
    olmo2 = read("olmo2")
    assert (olmo2.norm_epsilon, olmo2.num_kv_heads) == (1e-5, 8)
    assert (olmo2.pre_norms, olmo2.post_norms, olmo2.wide_qk_norm) == (False, True, True)


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_a_null_number_of_key_heads_is_that_of_query_heads(name):
    assert read(name, num_key_value_heads=None).num_kv_heads == 8


def test_a_null_switches_a_window_off_where_silence_means_the_default():
    config = read("mistral", sliding_window=None)
    assert (config.sliding_window, config.local_layers) == (0, ())
    assert not read("qwen2", num_key_value_heads=8, sliding_window=None).local_layers


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_qwen_has_windows_only_where_they_are_in_use(name):
    on = {"model_type": name, "num_key_value_heads": 2, "use_sliding_window": True}
    assert local_layers(**on, max_window_layers=5, sliding_window=9) == [5, 6]
    assert local_layers(**on, max_window_layers=5, sliding_window=None) == []
    assert local_layers(**on, max_window_layers=0) == list(range(7))
    assert local_layers(**on) == []  # from layer 28 on
    off = {**on, "use_sliding_window": False}
    assert local_layers(**off, max_window_layers=0, sliding_window=9) == []
    kinds = [LOCAL, GLOBAL, GLOBAL, LOCAL, GLOBAL, GLOBAL, LOCAL]
    assert local_layers(**on, max_window_layers=5, layer_types=kinds) == [0, 3, 6]


def test_a_listed_layer_of_smollm3_wins_over_the_interval():
    base = {"num_key_value_heads": 2, "no_rope_layer_interval": 3}
    assert read("smollm3", **base).rope_layers == (True, True, False) * 2 + (True,)
    listed = read("smollm3", **base, no_rope_layers=[0, 1, 1, 1, 1, 1, 0, 0, 0])
    assert listed.rope_layers == (False, True, True, True, True, True, False)
    assert read("smollm3", **base, no_rope_layers=[1] * 7).rope_layers == ()


def test_local_layers_of_smollm3_are_those_that_do_not_turn_unless_listed():
    on = {
        "model_type": "smollm3",
        "num_key_value_heads": 2,
        "use_sliding_window": True,
        "sliding_window": 5,
    }
    assert local_layers(**on) == [3]
    assert local_layers(**on, layer_types=[LOCAL] * 2 + [GLOBAL] * 5) == [0, 1]


@pytest.mark.parametrize("name", ["llama", "qwen3", "smollm3", "olmo2"])
def test_a_bias_on_attention_is_on_all_four_projections(name):
    config = read(name, num_key_value_heads=2, attention_bias=True)
    assert config.attention_bias == "all"
    assert not config.mlp_bias


def test_qwen2_has_its_biases_whatever_the_file_says():
    for said in (True, False, None):
        config = read("qwen2", num_key_value_heads=2, attention_bias=said)
        assert config.attention_bias == "qkv"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "mistral", "attention_bias": True}, "attention_bias is True; expected"),
        (
            {"model_type": "mistral", "sliding_window": 8, "layer_types": [LOCAL, GLOBAL]},
            "sliding_window 8; expected sliding_attention for each of 7 layers, or none",
        ),
        (
            {"model_type": "mistral", "sliding_window": None, "layer_types": [LOCAL] * 7},
            "sliding_window None; expected full_attention for each",
        ),
        ({"model_type": "mistral", "hidden_act": "gelu"}, "expected silu, as every mistral has"),
        (
            {"model_type": "qwen2", "layer_types": [LOCAL] * 7, "sliding_window": 8},
            "use_sliding_window False and sliding_window 8; expected a window in use",
        ),
        (
            {
                "model_type": "qwen3",
                "layer_types": [LOCAL] * 7,
                "use_sliding_window": True,
                "sliding_window": None,
            },
            "sliding_window None; expected a window in use",
        ),
        ({"model_type": "qwen3", "layer_types": [GLOBAL] * 3}, "each of 7 layers"),
        ({"model_type": "qwen3", "layer_types": ["chunked_attention"] * 7}, "layer_types"),
        ({"model_type": "qwen2", "max_window_layers": -1}, "max_window_layers -1; expected"),
        ({"model_type": "qwen2", "use_sliding_window": "yes"}, "use_sliding_window 'yes'"),
        ({"model_type": "qwen2", "use_mrope": True}, "use_mrope is True"),
        ({"model_type": "qwen2", "rope_scaling": {"type": "yarn", "factor": 4.0}}, "'yarn'"),
        ({"model_type": "qwen3", "num_experts": 128}, "num_experts is 128"),
        ({"model_type": "smollm3", "no_rope_layers": [1, 0]}, "0 or 1 for each of 7 layers"),
        ({"model_type": "smollm3", "no_rope_layers": [2] * 7}, "0 or 1 for each of 7 layers"),
        ({"model_type": "smollm3", "no_rope_layer_interval": 0}, "no_rope_layer_interval is 0"),
        ({"model_type": "mixtral"}, r"\(Mixtral, a mixture of experts\); expected one of llama"),
        ({"model_type": "qwen3_moe"}, r"\(Qwen3-MoE, a mixture of experts\)"),
        ({"model_type": "olmoe"}, r"\(OLMoE, a mixture of experts\)"),
        ({"model_type": "llama4"}, r"\(Llama 4, a mixture of experts\)"),
        ({"model_type": "mistral4"}, r"\(Mistral 4, a mixture of experts\)"),
        ({"model_type": "phi3"}, r"\(Phi 3 and 4, whose kernels are fused\)"),
        ({"model_type": "qwen3_next"}, r"\(Qwen3-Next, whose attention is linear"),
        ({"model_type": "qwen3_5"}, r"\(Qwen3.5, whose attention is linear"),
        ({"model_type": "olmo3"}, r"\(OLMo 3, "),
        ({"model_type": "gpt_oss"}, "got model_type 'gpt_oss'; expected one of llama"),
    ],
)
def test_what_would_be_another_function_is_one_clear_line(fields, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        read(**{"num_key_value_heads": 2, **fields})
    assert str(caught.value).startswith("there/config.json")
    assert "\n" not in str(caught.value)


def test_the_refusal_of_a_family_lists_all_that_are_read():
    with pytest.raises(CheckpointError) as caught:
        read("mixtral")
    assert all(name in str(caught.value) for name in FAMILIES)


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("mistral", {"sliding_window": 11, "head_dim": 6}),
        ("qwen2", {}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 5}),
        ("qwen3", {"attention_bias": True, "head_dim": 6}),
        ("qwen3", {"use_sliding_window": True, "layer_types": [LOCAL, GLOBAL] * 3 + [LOCAL]}),
        ("smollm3", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
        ("smollm3", {"use_sliding_window": True, "sliding_window": 5, "rope_theta": 3e5}),
        ("olmo2", {"attention_bias": True}),
    ],
)
def test_config_survives_the_way_there_and_back(model_type, fields):
    config = read(model_type, num_key_value_heads=2, **fields)
    written = config_to_hf(config, dtype="bfloat16")
    assert written["model_type"] == model_type
    assert config_from_hf(written) == config


def test_options_that_no_model_type_has_together_are_refused():
    some_local = dataclasses.replace(
        read("mistral", sliding_window=8), local_layers=(True,) * 6 + (False,)
    )
    with pytest.raises(ValueError, match=r"got a decoder whose .*local_layers.* no mistral has"):
        config_to_hf(some_local, dtype="float32")
    half_turned = dataclasses.replace(read("olmo2"), rope_layers=(True,) * 6 + (False,))
    with pytest.raises(ValueError, match=r"got a decoder whose rope_layers no olmo2 has"):
        config_to_hf(half_turned, dtype="float32")
