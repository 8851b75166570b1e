"""Gemma checkpoints written by transformers give transformers' logits, one option at a time.

Each option has a negative control: the same weights read without it must give other logits.
"""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from smoa_jax.adapter.config import SmoaConfig
from smoa_jax.adapter.merge import merge_smoa
from smoa_jax.adapter.tree import apply_smoa
from smoa_jax.adapter.types import is_modulation
from smoa_jax.checkpoint.base import load_base, open_base
from smoa_jax.checkpoint.export.huggingface import export_huggingface, export_stored
from smoa_jax.checkpoint.export.merged import MergedReader
from smoa_jax.checkpoint.native.directory import open_adapter, save_adapter
from smoa_jax.models.config import RopeScaling
from smoa_jax.models.decoder import Decoder
from tests.parity.shared import check_prompts_of_several_lengths, scaled
from tests.parity.test_checkpoint_llama import (
    TOKENS,
    difference,
    our_logits,
    torch_logits,
    without,
)

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

CLASSES = {
    "gemma": ("GemmaConfig", "GemmaForCausalLM"),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM"),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM"),
}
SIZES = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
WINDOWS = {
    "sliding_window": 8,
    "query_pre_attn_scalar": 40,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
ROPE3 = {
    "full_attention": {"rope_type": "default", "rope_theta": 2000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}


def torch_model(family: str, seed: int = 0, **options):
    torch.manual_seed(seed)
    config, model = (getattr(transformers, name) for name in CLASSES[family])
    fields = SIZES if family == "gemma" else {**SIZES, **WINDOWS}
    if family == "gemma3":
        fields = {**fields, "rope_parameters": {k: dict(v) for k, v in ROPE3.items()}}
    made = model(config(**{**fields, **options}, attn_implementation="eager"))
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if name.endswith("norm.weight"):  # all zeros at first, which would hide a missing one
                weight.uniform_(-0.5, 0.5)
    return made.eval()


def changed(**changes):
    """A control: the same weights under a config that has lost an option."""
    return lambda base: without(base, **changes)


def lost_norm(name: str):
    """A control: the same weights with one norm scaling by one."""

    def control(base):
        layers = dict(base.params["layers"])
        part = layers
        if name in ("q_norm", "k_norm"):
            part = layers["self_attn"] = dict(layers["self_attn"])
        part[name] = {"scale": jnp.zeros_like(part[name]["scale"])}
        return our_logits({**base.params, "layers": layers}, base.config)

    return control


LINEAR3 = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
OPTIONS = {
    "gemma-embed_scale": ("gemma", {}, changed(embed_scale=1.0)),
    "gemma-norm_offset": ("gemma", {}, changed(norm_offset=0.0)),
    "gemma-activation": ("gemma", {}, changed(activation="silu")),
    "gemma-head_dim": ("gemma", {"head_dim": 20}, changed(query_scale=0.1)),
    "gemma-rope_base": (
        "gemma",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
        changed(rope_base=10000.0),
    ),
    "gemma2-soft_cap": (
        "gemma2",
        {"attn_logit_softcapping": 3.0, "final_logit_softcapping": None},
        changed(attention_soft_cap=0.0),
    ),
    "gemma2-final_soft_cap": (
        "gemma2",
        {"attn_logit_softcapping": None, "final_logit_softcapping": 5.0},
        changed(final_soft_cap=0.0),
    ),
    "gemma2-window": ("gemma2", {}, changed(sliding_window=3)),
    "gemma2-which_layers": ("gemma2", {}, changed(local_layers=(False, True, False))),
    "gemma2-default_layers": (
        "gemma2",
        {"layer_types": None},
        changed(local_layers=(False, True, False)),
    ),
    "gemma2-query_scale": ("gemma2", {}, changed(query_scale=0.0)),
    "gemma2-post_norm": ("gemma2", {}, lost_norm("post_attention_layernorm")),
    "gemma2-post_mlp_norm": ("gemma2", {}, lost_norm("post_feedforward_layernorm")),
    "gemma2-pre_mlp_norm": ("gemma2", {}, lost_norm("pre_feedforward_layernorm")),
    "gemma3-q_norm": ("gemma3", {}, lost_norm("q_norm")),
    "gemma3-k_norm": ("gemma3", {}, lost_norm("k_norm")),
    "gemma3-local_rope": ("gemma3", {}, changed(local_rope_base=0.0)),
    "gemma3-global_rope": ("gemma3", {}, changed(rope_base=1e6)),
    "gemma3-window": ("gemma3", {}, changed(sliding_window=3)),
    "gemma3-pattern": (
        "gemma3",
        {"layer_types": None, "num_hidden_layers": 7, "sliding_window_pattern": 3},
        changed(local_layers=(True,) * 5 + (False, True)),
    ),
    "gemma3-linear_rope": (
        "gemma3",
        {"rope_parameters": LINEAR3},
        changed(rope_scaling=RopeScaling()),
    ),
    "gemma3-final_soft_cap": (
        "gemma3",
        {"final_logit_softcapping": 5.0},
        changed(final_soft_cap=0.0),
    ),
    "gemma3-untied": (
        "gemma3",
        {"tie_word_embeddings": False},
        lambda base: our_logits(
            {key: part for key, part in base.params.items() if key != "lm_head"},
            dataclasses.replace(base.config, tie_embeddings=True),
        ),
    ),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_logits_agree_with_transformers_and_need_the_option(tmp_path, option):
    family, options, control = OPTIONS[option]
    model = torch_model(family, **options)
    model.save_pretrained(tmp_path)
    base = load_base(tmp_path)
    wanted = torch_logits(model)
    assert difference(our_logits(base.params, base.config), wanted) < 1e-4
    assert difference(control(base), wanted) > 1e-2


@pytest.mark.parametrize("family", CLASSES)
def test_prompts_of_several_lengths_in_one_batch_equal_transformers_one_by_one(tmp_path, family):
    model = torch_model(family)
    model.save_pretrained(tmp_path)
    check_prompts_of_several_lengths(model, load_base(tmp_path))


@pytest.mark.parametrize("from_source", [True, False])
@pytest.mark.parametrize(
    "option",
    ["gemma-rope_base", "gemma2-soft_cap", "gemma2-window", "gemma3-linear_rope", "gemma3-untied"],
)
def test_an_exported_model_is_opened_by_transformers(tmp_path, option, from_source):
    family, options, _ = OPTIONS[option]
    model = torch_model(family, **options)
    model.save_pretrained(tmp_path / "source")
    base = load_base(tmp_path / "source")
    changed = scaled(base.params)
    export_huggingface(
        changed,
        base.config,
        tmp_path / "out",
        dtype=jnp.float32,
        hf_config=base.hf_config if from_source else None,
        generation_config=base.generation_config if from_source else None,
        max_shard_bytes=30_000,
    )
    opened = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager"
    ).eval()
    assert type(opened) is type(model)
    assert difference(torch_logits(opened), our_logits(changed, base.config)) < 1e-4
    assert difference(torch_logits(opened), torch_logits(model)) > 1e-2
    tied = opened.lm_head.weight is opened.model.embed_tokens.weight
    assert tied == base.config.tie_embeddings


def multimodal_model(seed: int = 0):
    torch.manual_seed(seed)
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
        "vision_use_head": False,
    }
    config = transformers.Gemma3Config(
        text_config={**SIZES, **WINDOWS, "rope_parameters": {k: dict(v) for k, v in ROPE3.items()}},
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=93,
        boi_token_index=94,
        eoi_token_index=95,
        attn_implementation="eager",
    )
    return transformers.Gemma3ForConditionalGeneration(config).eval()


@pytest.mark.parametrize("layout", ["language_model.model.", "model.language_model."])
def test_the_text_part_of_a_multimodal_model_goes_back_where_it_was(tmp_path, layout):
    model = multimodal_model()
    model.save_pretrained(tmp_path / "source", max_shard_size="40KB")
    if layout.startswith("model."):
        renamed = {
            name.replace("language_model.model.", layout): tensor
            for file in (tmp_path / "source").glob("*.safetensors")
            for name, tensor in load_file(file).items()
        }
        for file in (tmp_path / "source").glob("*.safetensors*"):
            file.unlink()
        save_file(renamed, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "source" / "preprocessor_config.json").write_text('{"size": 28}')
    base = load_base(tmp_path / "source")
    text = torch.tensor(TOKENS % 90)  # none of the image's own tokens
    with torch.no_grad():
        wanted = model(text).logits.numpy()
    ours = Decoder(base.config, dtype=jnp.float32).apply({"params": base.params}, TOKENS % 90)
    assert difference(np.asarray(ours), wanted) < 1e-4
    export_huggingface(
        scaled(base.params),
        base.config,
        tmp_path / "out",
        dtype=jnp.float32,
        hf_config=base.hf_config,
        multimodal_source=base.source,
        max_shard_bytes=40_000,
    )
    names = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert any(name.startswith(layout) for name in names["weight_map"])
    assert (tmp_path / "out" / "preprocessor_config.json").read_text() == '{"size": 28}'
    opened = transformers.AutoModelForImageTextToText.from_pretrained(
        tmp_path / "out", attn_implementation="eager"
    ).eval()
    assert type(opened) is type(model)
    with torch.no_grad():
        got = opened(text).logits.numpy()
    changed = Decoder(base.config, dtype=jnp.float32).apply(
        {"params": scaled(base.params)}, TOKENS % 90
    )
    assert difference(got, np.asarray(changed)) < 1e-4
    before = {k: v for k, v in model.state_dict().items() if "vision" in k or "projector" in k}
    after = opened.state_dict()
    assert before
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    with pytest.raises(ValueError, match="expected the directory of a multimodal model"):
        export_huggingface(
            base.params,
            base.config,
            tmp_path / "lost",
            dtype=jnp.float32,
            hf_config=base.hf_config,
        )


def test_a_multimodal_model_is_merged_on_the_host_as_in_memory(tmp_path):
    multimodal_model().save_pretrained(tmp_path / "source", max_shard_size="40KB")
    base = load_base(tmp_path / "source")
    config = SmoaConfig(rank=2, num_subspaces=2, target_modules=["q_proj", "down_proj"])
    params = jax.tree.map(
        lambda node: dataclasses.replace(node, b=node.b + 0.1) if is_modulation(node) else node,
        apply_smoa(base.params, config, jax.random.key(0)),
        is_leaf=is_modulation,
    )
    known = {"base_fingerprint": base.fingerprint, "base_name": "tiny"}
    save_adapter(params, config, tmp_path / "adapter", **known)
    settings = {
        "dtype": jnp.float32,
        "hf_config": base.hf_config,
        "multimodal_source": base.source,
        "max_shard_bytes": 30_000,
    }
    export_huggingface(merge_smoa(params), base.config, tmp_path / "memory", **settings)
    stored = open_base(tmp_path / "source")
    found, _ = open_adapter(
        tmp_path / "adapter", stored.params, base_fingerprint=stored.fingerprint
    )
    reader = MergedReader(stored, found, config)
    export_stored(reader, stored.slots, stored.config, tmp_path / "disk", **settings)
    names = sorted(path.name for path in (tmp_path / "memory").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "disk").iterdir())
    for name in names:
        assert (tmp_path / "memory" / name).read_bytes() == (tmp_path / "disk" / name).read_bytes()
