"""Gemma 4 checkpoints written by transformers: logits, generation, gradients, exports.

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
from smoa_jax.checkpoint.errors import CheckpointError
from smoa_jax.checkpoint.export.huggingface import export_huggingface, export_stored
from smoa_jax.checkpoint.export.merged import MergedReader
from smoa_jax.checkpoint.huggingface.config import config_from_hf, config_to_hf
from smoa_jax.checkpoint.names import layer_numbers
from smoa_jax.checkpoint.native.directory import open_adapter, save_adapter
from smoa_jax.models.config import RopeScaling
from smoa_jax.models.decoder import Decoder
from smoa_jax.models.generation import GenerationConfig, generate
from tests.parity.shared import check_prompts_of_several_lengths, scaled
from tests.parity.test_checkpoint_llama import TOKENS, difference, our_logits, torch_logits

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

LOCAL, GLOBAL = "sliding_attention", "full_attention"
SIZES = {
    "vocab_size": 96,
    "vocab_size_per_layer_input": 96,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "head_dim": 8,
    "global_head_dim": 16,
    "sliding_window": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "final_logit_softcapping": 30.0,
    "rope_parameters": {
        LOCAL: {"rope_type": "default", "rope_theta": 100.0},
        GLOBAL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 500.0},
    },
}


def periods(*kinds: str) -> list[str]:
    return [{"L": LOCAL, "G": GLOBAL}[kind] for kind in "".join(kinds)]


#: Each published size in small, uneven in layers, heads and widths, and what else a file may say.
KINDS = {
    "e2b": {
        "layer_types": periods("LLG" * 3, "LLG" * 2),
        "num_kv_shared_layers": 6,
        "use_double_wide_mlp": True,
        "num_key_value_heads": 1,
        "hidden_size_per_layer_input": 12,
    },
    "e4b": {
        "layer_types": periods("LLLG" * 2, "LLLG"),
        "num_kv_shared_layers": 4,
        "num_key_value_heads": 2,
        "hidden_size_per_layer_input": 12,
    },
    "31b": {
        "layer_types": periods("LLLG" * 2),
        "num_key_value_heads": 4,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "hidden_size_per_layer_input": 0,
    },
    "irregular": {
        "layer_types": periods("LGLLG"),
        "num_key_value_heads": 2,
        "hidden_size_per_layer_input": 0,
    },
    "one_shape": {
        "layer_types": periods("LLG"),
        "num_key_value_heads": 2,
        "global_head_dim": 8,
        "hidden_size_per_layer_input": 12,
    },
}


def torch_model(kind: str, seed: int = 0, **options):
    torch.manual_seed(seed)
    fields = {**SIZES, **KINDS[kind], **options}
    fields.setdefault("num_hidden_layers", len(fields["layer_types"] or ()))
    fields["rope_parameters"] = {k: dict(v) for k, v in fields["rope_parameters"].items()}
    config = transformers.Gemma4TextConfig(**fields, attn_implementation="eager")
    made = transformers.Gemma4ForCausalLM(config)
    with torch.no_grad():
        for name, weight in made.state_dict().items():
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                weight.uniform_(0.3, 0.8)  # scores of a scale at which float32 still tells
            elif name.endswith(("norm.weight", "layer_scalar")):
                weight.uniform_(0.5, 1.5)  # all ones at first, which would hide a missing one
    return made.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_logits_agree_with_transformers(tmp_path, kind):
    model = torch_model(kind)
    model.save_pretrained(tmp_path)
    base = load_base(tmp_path)
    assert difference(our_logits(base.params, base.config), torch_logits(model)) < 1e-4


def changed(**changes):
    return lambda base: our_logits(base.params, dataclasses.replace(base.config, **changes))


def lost(*path: str, fill: float = 1.0):
    """A control whose weights at the end of ``path``, in whatever stack, are all ``fill``."""

    def control(base):
        def visit(where, leaf):
            keys = tuple(key.key for key in where)
            return jnp.full_like(leaf, fill) if keys[-len(path) :] == path else leaf

        params = jax.tree_util.tree_map_with_path(visit, base.params)
        return our_logits(params, base.config)

    return control


def swapped_periods(base):
    """The logits when the local layers of two periods change places."""
    layers = dict(base.params["layers"])
    layers["local"] = jax.tree.map(lambda leaf: leaf[::-1], layers["local"])
    return our_logits({**base.params, "layers": layers}, base.config)


SCALED_ROPE = {
    LOCAL: {"rope_type": "default", "rope_theta": 100.0},
    GLOBAL: {
        "rope_type": "proportional",
        "partial_rotary_factor": 0.5,
        "rope_theta": 500.0,
        "factor": 4.0,
    },
}
OPTIONS = {
    "v_norm": ("e4b", {}, changed(value_norm=False)),
    "q_norm": ("e2b", {}, lost("q_norm", "scale")),
    "k_norm": ("31b", {}, lost("k_norm", "scale")),
    "norm_offset": ("31b", {}, changed(norm_offset=1.0)),
    "scale": ("31b", {}, changed(query_scale=0.0)),
    "window": ("e4b", {}, changed(sliding_window=5)),
    "local_rope": ("31b", {}, changed(local_rope_base=1e4)),
    "global_rope": ("31b", {}, changed(rope_base=1e6)),
    "proportional": ("31b", {}, changed(rope_scaling=RopeScaling())),
    "rope_factor": (
        "31b",
        {"rope_parameters": SCALED_ROPE},
        changed(rope_scaling=RopeScaling(kind="proportional", rotated_share=0.5)),
    ),
    "rope_share": (
        "31b",
        {"rope_parameters": SCALED_ROPE},
        changed(rope_scaling=RopeScaling(kind="proportional", factor=4.0)),
    ),
    "layer_scalar": ("e4b", {}, lost("layer_scalar")),
    "per_layer_table": ("e2b", {}, lost("embed_tokens_per_layer", "embedding", fill=0.0)),
    "per_layer_projection": ("e2b", {}, lost("per_layer_model_projection", "kernel", fill=0.0)),
    "per_layer_norm": ("e4b", {}, lost("per_layer_projection_norm", "scale")),
    "per_layer_gate": ("one_shape", {}, lost("per_layer_input_gate", "kernel", fill=0.0)),
    "post_per_layer_norm": ("e4b", {}, lost("post_per_layer_input_norm", "scale")),
    "post_norm": ("31b", {}, lost("post_attention_layernorm", "scale")),
    "final_soft_cap": ("31b", {"final_logit_softcapping": 2.0}, changed(final_soft_cap=0.0)),
    "order": ("31b", {}, swapped_periods),
    "keys_as_values": (
        "31b",
        {"attention_k_eq_v": False},
        lost("global", "self_attn", "v_proj", "kernel", fill=0.0),
    ),
    "vision": ("31b", {"use_bidirectional_attention": "vision"}, changed(sliding_window=5)),
    "last_layer": (
        "irregular",
        {"layer_types": periods("LGLLL")},  # transformers makes the last one global
        changed(sliding_window=5),
    ),
    "default_layers": (
        "31b",
        {"layer_types": None, "num_hidden_layers": 12},
        changed(sliding_window=5),
    ),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_logits_agree_and_need_the_option(tmp_path, option):
    kind, options, control = OPTIONS[option]
    model = torch_model(kind, **options)
    model.save_pretrained(tmp_path)
    base = load_base(tmp_path)
    wanted = torch_logits(model)
    assert difference(our_logits(base.params, base.config), wanted) < 1e-4
    assert difference(control(base), wanted) > 3e-3


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_of_several_lengths_in_one_batch_equal_transformers_one_by_one(tmp_path, kind):
    model = torch_model(kind)
    model.save_pretrained(tmp_path)
    check_prompts_of_several_lengths(model, load_base(tmp_path))


@pytest.mark.parametrize("kind", ["e2b", "31b"])
@pytest.mark.parametrize("spelling", ["google", "transformers"])
def test_an_exported_model_is_opened_by_transformers(tmp_path, kind, spelling):
    model = torch_model(kind)
    model.save_pretrained(tmp_path / "source")
    in_spelling(tmp_path / "source" / "config.json", spelling)
    base = load_base(tmp_path / "source")
    changed = scaled(base.params)
    export_huggingface(
        changed,
        base.config,
        tmp_path / "out",
        dtype=jnp.float32,
        hf_config=base.hf_config,
        max_shard_bytes=30_000,
    )
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "per_layer_config" not in written
    assert written["global_head_dim"] == 16
    assert written["num_global_key_value_heads"] == (1 if kind == "31b" else None)
    opened = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager"
    ).eval()
    assert type(opened) is type(model)
    assert difference(torch_logits(opened), our_logits(changed, base.config)) < 1e-4
    assert difference(torch_logits(opened), torch_logits(model)) > 1e-2
    opened.save_pretrained(tmp_path / "again")
    again = load_base(tmp_path / "again")
    assert again.config == base.config
    jax.tree.map(np.testing.assert_array_equal, again.params, changed)


def in_spelling(path, spelling: str) -> None:
    """A config.json that says the global layers' heads as Google or as transformers does."""
    fields = json.loads(path.read_text())
    assert "per_layer_config" in fields
    if spelling == "google":
        entry = next(iter(fields.pop("per_layer_config").values()))
        fields["global_head_dim"] = entry["head_dim"]
        fields["num_global_key_value_heads"] = entry.get("num_key_value_heads")
        path.write_text(json.dumps(fields))


def test_a_config_is_written_from_the_decoder_alone(tmp_path):
    for kind in KINDS:
        model = torch_model(kind)
        model.save_pretrained(tmp_path / kind)
        base = load_base(tmp_path / kind)
        fields = config_to_hf(base.config, dtype="float32")
        assert config_from_hf(fields) == base.config
        theirs = transformers.Gemma4TextConfig(**{k: v for k, v in fields.items() if k != "dtype"})
        assert theirs.layer_types == model.config.layer_types
        for one, other in zip(theirs.per_layer_config, model.config.per_layer_config, strict=True):
            assert (one.head_dim, one.num_key_value_heads) == (
                other.head_dim,
                other.num_key_value_heads,
            )


def with_unused_tensors(directory, first_shared: int, config) -> dict[str, np.ndarray]:
    """Google's files hold keys and values for the layers that share them, too; what was added."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    prefix = next(name.split("layers.0.")[0] for name in tensors if ".layers.0.self_attn" in name)
    rng = np.random.default_rng(4)
    added = {}
    for layer in range(first_shared, config.num_hidden_layers):
        head_dim = 16 if config.layer_types[layer] == GLOBAL else 8
        shapes = {"k_proj": (head_dim, 48), "v_proj": (head_dim, 48), "k_norm": (head_dim,)}
        for name, shape in shapes.items():
            key = f"{prefix}layers.{layer}.self_attn.{name}.weight"
            added[key] = rng.normal(size=shape).astype(np.float32)
    save_file({**tensors, **added}, file, metadata={"format": "pt"})
    return added


def exported_merged(tmp_path, source, **settings):
    """The base with a small adapter, exported from disk as ``smoa export`` does it."""
    base = load_base(source)
    config = SmoaConfig(
        rank=2,
        target_modules=["q_proj", "down_proj"],
        layers=(1, 7, 11, 14),
        layer_numbers=layer_numbers(base.config),
    )
    params = jax.tree.map(
        lambda node: (
            dataclasses.replace(node, b=node.b + 0.1 * (node.scale > 0)[:, None, None])
            if is_modulation(node)
            else node
        ),
        apply_smoa(base.params, config, jax.random.key(0)),
        is_leaf=is_modulation,
    )
    save_adapter(
        params,
        config,
        tmp_path / "adapter",
        base_fingerprint=base.fingerprint,
        base_name="tiny",
    )
    stored = open_base(source)
    found, config = open_adapter(
        tmp_path / "adapter", stored.params, base_fingerprint=stored.fingerprint
    )
    export_stored(
        MergedReader(stored, found, config),
        stored.slots,
        stored.config,
        tmp_path / "out",
        dtype=jnp.float32,
        hf_config=stored.hf_config,
        **settings,
    )
    merged = merge_smoa(params)
    touched = {
        layer
        for layer, (one, other) in enumerate(
            zip(by_layer(merged, base.config), by_layer(base.params, base.config), strict=True)
        )
        if not np.array_equal(
            one["self_attn"]["q_proj"]["kernel"], other["self_attn"]["q_proj"]["kernel"]
        )
    }
    assert touched == {1, 7, 11, 14}
    return base, merged


def places(params, config):
    """Of each of the model's layers, the stack it lies in and its index there."""
    if "self_attn" in params["layers"]:
        return [(params["layers"], layer) for layer in range(config.num_layers)]
    own = config.num_layers - config.num_kv_shared_layers
    names = [
        ("local" if local else "global") + ("_shared" if layer >= own else "")
        for layer, local in enumerate(config.local_layers)
    ]
    return [(params["layers"][name], names[:layer].count(name)) for layer, name in enumerate(names)]


def by_layer(params, config):
    return [
        jax.tree.map(lambda leaf, at=index: leaf[at], stack)
        for stack, index in places(params, config)
    ]


def test_unused_keys_and_values_are_read_past_and_copied_through(tmp_path):
    model = torch_model("e2b")
    model.save_pretrained(tmp_path / "source")
    added = with_unused_tensors(tmp_path / "source", 9, model.config)
    assert len(added) == 18
    base, merged = exported_merged(tmp_path, tmp_path / "source")
    assert difference(our_logits(base.params, base.config), torch_logits(model)) < 1e-4
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name, value in added.items():
        np.testing.assert_array_equal(written[name], value)
    opened = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager"
    ).eval()
    assert difference(torch_logits(opened), our_logits(merged, base.config)) < 1e-4
    assert difference(torch_logits(opened), torch_logits(model)) > 1e-2


def test_keys_of_a_layer_that_has_its_own_are_no_surplus_to_be_left(tmp_path):
    model = torch_model("e2b")
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.3.self_attn.k_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"missing tensor model\.layers\.3\.self_attn\.k_proj"
    ):
        load_base(tmp_path)


def multimodal_model(unified: bool, seed: int = 0):
    torch.manual_seed(seed)
    fields = {**SIZES, **KINDS["31b" if unified else "e2b"]}
    fields["num_hidden_layers"] = len(fields["layer_types"])
    fields["rope_parameters"] = {k: dict(v) for k, v in fields["rope_parameters"].items()}
    ids = {"image_token_id": 93, "boi_token_id": 94, "eoi_token_id": 95, "video_token_id": 92}
    ids |= {"audio_token_id": 91, "boa_token_id": 90, "eoa_token_index": 89}
    if unified:
        vision = {
            "patch_size": 2,
            "pooling_kernel_size": 2,
            "mm_embed_dim": 48,
            "mm_posemb_size": 8,
        }
        config = transformers.Gemma4UnifiedConfig(
            text_config=without_per_layer(fields),
            vision_config=vision,
            audio_config={"audio_embed_dim": 6},
            **ids,
        )
        made = transformers.Gemma4UnifiedForConditionalGeneration(config)
    else:
        vision = {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "patch_size": 2,
            "position_embedding_size": 16,
        }
        config = transformers.Gemma4Config(text_config=fields, vision_config=vision, **ids)
        made = transformers.Gemma4ForConditionalGeneration(config)
    made.config._attn_implementation = "eager"
    return made.eval()


def without_per_layer(fields):
    return {k: v for k, v in fields.items() if "per_layer_input" not in k}


@pytest.mark.parametrize("unified", [False, True])
def test_the_text_part_of_a_multimodal_model_goes_back_where_it_was(tmp_path, unified):
    model = multimodal_model(unified)
    model.save_pretrained(tmp_path / "source")
    added = (
        {}
        if unified
        else with_unused_tensors(tmp_path / "source", 9, model.config.get_text_config())
    )
    base = load_base(tmp_path / "source")
    text = TOKENS % 88  # none of the images' and sounds' own tokens
    with torch.no_grad():
        wanted = model(torch.tensor(text)).logits.numpy()
    run = jax.jit(Decoder(base.config, dtype=jnp.float32).apply)
    assert difference(np.asarray(run({"params": base.params}, text)), wanted) < 1e-4
    export_huggingface(
        scaled(base.params),
        base.config,
        tmp_path / "out",
        dtype=jnp.float32,
        hf_config=base.hf_config,
        multimodal_source=base.source,
    )
    before = load_file(tmp_path / "source" / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    towers = {name for name in before if "language_model" not in name} | added.keys()
    assert any("vision" in name for name in towers)
    for name in before:
        assert np.array_equal(before[name], after[name]) == (name in towers), name
    opened = transformers.AutoModelForImageTextToText.from_pretrained(
        tmp_path / "out", attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        got = opened(torch.tensor(text)).logits.numpy()
    changed = np.asarray(run({"params": scaled(base.params)}, text))
    assert difference(got, changed) < 1e-4
    opened.save_pretrained(tmp_path / "again")
    again = load_base(tmp_path / "again")
    jax.tree.map(np.testing.assert_array_equal, again.params, scaled(base.params))


REFUSED = {
    "mixture": ({"enable_moe_block": True}, "enable_moe_block"),
    "bidirectional": ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention"),
    "table": (
        {"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 12},
        "vocab_size_per_layer_input 64",
    ),
    "sharing": (
        {"layer_types": [GLOBAL, LOCAL, LOCAL], "num_hidden_layers": 3, "num_kv_shared_layers": 2},
        "num_kv_shared_layers 2 of 3",
    ),
    "uneven": (
        {"per_layer_config": {"2": {"head_dim": 16}, "5": {"head_dim": 24}}},
        "per_layer_config",
    ),
    "rope": ({"rope_parameters": {GLOBAL: {"rope_type": "yarn", "rope_theta": 5.0}}}, "yarn"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_implemented_is_refused_by_name(case):
    changes, named = REFUSED[case]
    fields = {**SIZES, **KINDS["31b"], "num_hidden_layers": 8, "model_type": "gemma4_text"}
    config_from_hf(fields)
    with pytest.raises(CheckpointError, match=named):
        config_from_hf({**fields, **changes})


def test_beams_over_shared_keys_equal_transformers(tmp_path):
    model = torch_model("e2b")
    model.save_pretrained(tmp_path)
    base = load_base(tmp_path)
    eos_ids = (3, 9, 11, 14, 17, 20, 23)
    made = generate(
        Decoder(base.config, dtype=jnp.float32),
        base.params,
        TOKENS,
        [24, 5],
        GenerationConfig(max_new_tokens=10, eos_ids=eos_ids, num_beams=3),
    )
    for row, length in enumerate([24, 5]):
        text = torch.tensor(TOKENS[row : row + 1, :length])
        wanted = model.generate(
            text,
            attention_mask=torch.ones_like(text),
            max_new_tokens=10,
            do_sample=False,
            num_beams=3,
            early_stopping="never",
            eos_token_id=list(eos_ids),
            pad_token_id=0,
        )[0, length:].tolist()
        count = int(made.lengths[row])
        assert np.asarray(made.tokens)[row, :count].tolist() == wanted[:count]
        assert set(wanted[count:]) <= {0}
