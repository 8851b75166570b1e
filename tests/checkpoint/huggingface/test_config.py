"""config.json in both directions."""

from __future__ import annotations

import dataclasses

import pytest

from smoa_jax.checkpoint.errors import CheckpointError
from smoa_jax.checkpoint.huggingface.config import config_from_hf, config_to_hf
from smoa_jax.models.config import DecoderConfig, RopeScaling
from tests.checkpoint.hf_files import CONFIG

LLAMA3 = {
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_type": "llama3",
}
LLAMA3_SCALING = RopeScaling(
    kind="llama3",
    factor=32.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_positions=64,
)


def without(*keys: str) -> dict:
    return {key: value for key, value in CONFIG.items() if key not in keys}


def test_every_field_lands_where_written_here():
    assert config_from_hf(CONFIG) == DecoderConfig(
        vocab_size=64,
        embed_dim=32,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        mlp_dim=96,
        rope_base=10000.0,
        norm_epsilon=1e-5,
        tie_embeddings=False,
        max_positions=128,
        activation="silu",
        rope_scaling=RopeScaling(),
    )


def test_what_a_file_leaves_out_is_what_transformers_assumes():
    left_out = ("num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings")
    left_out += ("rope_theta", "hidden_act", "tie_word_embeddings")
    config = config_from_hf(without(*left_out))
    assert (config.num_kv_heads, config.head_dim, config.norm_epsilon) == (4, 8, 1e-6)
    assert (config.max_positions, config.rope_base) == (2048, 10000.0)
    assert (config.activation, config.tie_embeddings) == ("silu", False)
    nulls = {key: None for key in left_out}
    assert config_from_hf({**CONFIG, **nulls}) == config


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        {"rope_parameters": {"rope_theta": 5e5, **LLAMA3}},
        {"rope_theta": 5e5, "rope_parameters": LLAMA3},
        {"rope_parameters": {"rope_theta": 5e5, **LLAMA3}, "rope_scaling": LLAMA3},
    ],
)
def test_old_and_new_rope_fields_mean_the_same(rope):
    config = config_from_hf({**without("rope_theta"), **rope})
    assert config.rope_base == 5e5
    assert config.rope_scaling == LLAMA3_SCALING


def test_older_spelling_of_linear_scaling_is_read():
    config = config_from_hf({**CONFIG, "rope_scaling": {"type": "linear", "factor": 2}})
    assert config.rope_scaling == RopeScaling(kind="linear", factor=2.0)


def test_an_original_length_outside_of_the_scaling_wins_as_in_transformers():
    fields = {"rope_scaling": LLAMA3, "original_max_position_embeddings": 32}
    config = config_from_hf({**CONFIG, **fields})
    assert config.rope_scaling.original_max_positions == 32


def test_llama3_scaling_without_its_original_length_takes_the_models():
    rope = {key: value for key, value in LLAMA3.items() if not key.startswith("original")}
    config = config_from_hf({**CONFIG, "rope_scaling": rope})
    assert config.rope_scaling.original_max_positions == 128


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba'; expected one of llama"),
        ({"model_type": None}, "model_type None; expected one of llama"),
        ({"attention_bias": "qkv"}, "attention_bias 'qkv'; expected true or false"),
        ({"mlp_bias": 1}, "mlp_bias 1; expected true or false"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1; expected 0"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; expected 1"),
        ({"rope_interleaved": True}, "rope_interleaved is True; expected False"),
        ({"quantization_config": {"quant_method": "awq"}}, "name the unquantised model"),
        ({"auto_map": {"AutoModel": "modeling_x.X"}}, "remote code are refused"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'; expected silu"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "expected one of default, lin"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_type 'dynamic'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor None; expected a number above 0"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor None"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": 9.0}}, "expected 0 < low < high"),
        ({"rope_scaling": "linear"}, "rope_scaling 'linear'; expected an object"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "a part of each head"),
        ({"rope_parameters": {"full_attention": LLAMA3}}, "differs by kind of layer (full_"),
        ({"rope_parameters": {"rope_theta": 5.0}}, "rope_theta, rope_parameters, which contradict"),
        ({"rope_parameters": {"rope_type": "default"}, "rope_scaling": LLAMA3}, "contradict"),
        ({"vocab_size": None}, "vocab_size is missing; expected a whole number"),
        ({"hidden_size": "32"}, "hidden_size is '32'; expected a whole number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; expected a whole number above 0"),
        ({"num_key_value_heads": 3}, "num_kv_heads 3"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps -1.0; expected a number above 0"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings 'yes'; expected true or false"),
    ],
)
def test_a_config_that_means_another_function_is_one_clear_line(changes, message):
    with pytest.raises(CheckpointError) as caught:
        config_from_hf({**CONFIG, **changes}, "some/config.json")
    assert message in str(caught.value)
    assert "some/config.json" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("harmless", [{"pretraining_tp": 2}, {"use_cache": False}, {"mine": [1]}])
def test_fields_that_change_nothing_are_let_through(harmless):
    assert config_from_hf({**CONFIG, **harmless}) == config_from_hf(CONFIG)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"rope_scaling": LLAMA3},
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {"num_key_value_heads": 4, "rope_theta": 77.0, "rms_norm_eps": 1e-3},
    ],
)
def test_config_survives_the_way_there_and_back(changes):
    config = config_from_hf({**CONFIG, **changes})
    assert config_from_hf(config_to_hf(config, dtype="float32")) == config


def test_the_sources_own_fields_are_kept_and_only_the_dtype_changes():
    source = {**CONFIG, "eos_token_id": [2, 3], "is_llama_config": True}
    written = config_to_hf(config_from_hf(source), source, dtype="bfloat16")
    assert written == {**source, "torch_dtype": "bfloat16"}
    newer = {**without("torch_dtype"), "dtype": "float16"}
    assert config_to_hf(config_from_hf(newer), newer, dtype="float32")["dtype"] == "float32"
    assert "torch_dtype" not in config_to_hf(config_from_hf(newer), newer, dtype="float32")


def test_a_source_that_describes_another_model_is_refused():
    config = dataclasses.replace(config_from_hf(CONFIG), rope_base=7.0)
    with pytest.raises(ValueError, match=r"differs from the model's config in rope_base"):
        config_to_hf(config, CONFIG, dtype="float32")
