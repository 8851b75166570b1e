"""The PEFT layout, spelt out: names, shapes and the fields of the config; no PyTorch needed."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from smoa_jax import SmoaConfig, apply_smoa
from smoa_jax.checkpoint.errors import CheckpointError
from smoa_jax.checkpoint.peft.export import export_peft
from smoa_jax.checkpoint.peft.names import decoder_module_name, module_naming
from smoa_jax.models.config import DecoderConfig
from smoa_jax.models.params import init_params

DECODER = DecoderConfig(
    vocab_size=40,
    embed_dim=16,
    num_layers=3,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    mlp_dim=24,
    rope_base=1e4,
    norm_epsilon=1e-5,
    tie_embeddings=True,
    max_positions=32,
)


def export(tmp_path, config, base=None, **changes):
    params = apply_smoa(base or init_params(DECODER, jax.random.key(0)), config, jax.random.key(1))
    directory = export_peft(params, config, tmp_path / "peft", base_model_name="b", **changes)
    fields = json.loads((directory / "adapter_config.json").read_text())
    return params, fields, load_file(directory / "adapter_model.safetensors")


def test_a_lora_of_two_kernels_written_out(tmp_path):
    config = SmoaConfig.lora(4, alpha=6.0, target_modules=["q_proj", "v_proj"], layers=(2,))
    params, fields, tensors = export(tmp_path, config)
    assert fields == {
        "base_model_name_or_path": "b",
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": 4,
        "lora_alpha": 6,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": ["q_proj", "v_proj"],
        "layers_to_transform": [2],
    }
    prefix = "base_model.model.model.layers.2.self_attn"
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        f"{prefix}.q_proj.lora_A.weight": (4, 16),
        f"{prefix}.q_proj.lora_B.weight": (16, 4),
        f"{prefix}.v_proj.lora_A.weight": (4, 16),
        f"{prefix}.v_proj.lora_B.weight": (8, 4),
    }
    a = params["layers"]["self_attn"]["v_proj"]["smoa"].a
    np.testing.assert_array_equal(tensors[f"{prefix}.v_proj.lora_A.weight"], a[2].T)


def test_blocks_become_a_hira_with_masked_factors_of_the_true_ranks(tmp_path):
    config = SmoaConfig(rank=4, ranks=(1, 3), target_modules=["k_proj"], alpha=2.0)
    params, fields, tensors = export(tmp_path, config)
    assert (fields["peft_type"], fields["r"]) == ("HIRA", 4)
    assert not [name for name in fields if name.startswith("lora")]
    node = params["layers"]["self_attn"]["k_proj"]["smoa"]
    name = "base_model.model.model.layers.1.self_attn.k_proj.hira_{}"
    a, b = tensors[name.format("A")], tensors[name.format("B")]
    assert (a.shape, b.shape) == ((4, 16), (8, 4))
    first = np.asarray(node.in_block[1]) == 0
    np.testing.assert_array_equal(a[0], np.where(first, node.a[1, :, 0], 0))
    np.testing.assert_array_equal(a[1:].T, np.where(first[:, None], 0, node.a[1]))


def test_only_whole_names_are_given_where_a_last_name_would_match_too_much(tmp_path):
    one = SmoaConfig.lora(2, target_modules=r"tower\.proj")
    base = {"tower": {"proj": {"kernel": np.ones((4, 4), np.float32)}}}

    def name(path, layer):
        return ".".join(path)

    _, fields, _ = export(tmp_path, one, base, hf_module_name=name)
    assert fields["target_modules"] == ["proj"]
    base["other"] = {"proj": {"kernel": np.ones((4, 4), np.float32)}}
    _, fields, _ = export(tmp_path, one, base, hf_module_name=name, overwrite=True)
    assert fields["target_modules"] == ["tower.proj"]


def test_ranks_that_differ_are_named_with_their_alpha(tmp_path):
    config = SmoaConfig.lora(
        4, rank_pattern={r".*k_proj": 2}, target_modules=["q_proj", "k_proj", "v_proj"]
    )
    _, fields, _ = export(tmp_path, config)
    assert (fields["r"], fields["lora_alpha"]) == (4, 4)
    assert fields["rank_pattern"] == fields["alpha_pattern"] == {"k_proj": 2}


def test_spectral_bands_are_refused_with_the_way_out(tmp_path):
    config = SmoaConfig(rank=4, partition="spectral_bands", target_modules=["k_proj"])
    with pytest.raises(ValueError, match=r"no place for a part of its spectrum.*merged model"):
        export(tmp_path, config)
    assert not list(tmp_path.iterdir())


def test_params_and_config_that_do_not_belong_together_are_refused(tmp_path):
    base = init_params(DECODER, jax.random.key(0))
    hira = SmoaConfig.hira(4, target_modules=["k_proj"])
    params = apply_smoa(base, hira, jax.random.key(1))
    arguments = {"directory": tmp_path / "peft", "base_model_name": "b"}
    for config, message in (
        (SmoaConfig.lora(4, target_modules=["k_proj"]), "of another kind"),
        (SmoaConfig.hira(4, alpha=8.0, target_modules=["k_proj"]), "scale 1 and rank 4"),
    ):
        with pytest.raises(ValueError, match=message):
            export_peft(params, config, **arguments)
    with pytest.raises(ValueError, match="without any adapter"):
        export_peft(base, hira, **arguments)
    assert not list(tmp_path.iterdir())


def test_an_occupied_directory_is_left_alone_unless_told(tmp_path):
    config = SmoaConfig.lora(4, target_modules=["k_proj"])
    export(tmp_path, config)
    with pytest.raises(CheckpointError, match="already exists and isn't empty"):
        export(tmp_path, config)
    _, fields, _ = export(tmp_path, SmoaConfig.lora(3, target_modules=["k_proj"]), overwrite=True)
    assert fields["r"] == 3


def test_a_module_that_is_not_our_decoders_needs_a_name():
    assert decoder_module_name(("layers", "mlp", "up_proj"), 7) == "model.layers.7.mlp.up_proj"
    assert decoder_module_name(("lm_head",), None) == "lm_head"
    with pytest.raises(ValueError, match=r"tower/proj.*give hf_module_name"):
        decoder_module_name(("tower", "proj"), None)


def test_the_decoder_of_a_multimodal_model_goes_by_whole_names(tmp_path):
    naming = module_naming({"model_type": "gemma3", "text_config": {}})
    assert naming(("lm_head",), None) == "lm_head"
    config = SmoaConfig.lora(2, target_modules=["q_proj"])
    _, fields, tensors = export(tmp_path, config, hf_module_name=naming)
    names = [f"model.language_model.layers.{layer}.self_attn.q_proj" for layer in range(3)]
    assert fields["target_modules"] == names
    assert f"base_model.model.{names[2]}.lora_A.weight" in tensors
    assert module_naming({"model_type": "gemma3_text"}) is decoder_module_name
