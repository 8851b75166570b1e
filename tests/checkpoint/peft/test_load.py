"""PEFT files written by hand: the names they come under, what is padded or folded or refused.

No PyTorch needed; ``tests/parity/test_peft_import.py`` has PEFT itself write them.
"""

from __future__ import annotations

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from smoa_jax import SmoaConfig, apply_smoa, merge_smoa
from smoa_jax.adapter.tree import find_modulations
from smoa_jax.checkpoint.errors import CheckpointError
from smoa_jax.checkpoint.peft import load as peft_load
from smoa_jax.checkpoint.peft.load import import_peft
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
    tie_embeddings=False,
    max_positions=32,
)
LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
HIRA = {"peft_type": "HIRA", "r": 2, "target_modules": ["q_proj"]}
SIZES = {"q_proj": (16, 16), "k_proj": (16, 8), "up_proj": (16, 24), "lm_head": (16, 40)}


@pytest.fixture(scope="module")
def base():
    return init_params(DECODER, jax.random.key(0))


def factors(*modules, rank=2, form="base_model.model.{}.lora_{}.weight", seed=0):
    """Random factors under the names that PEFT gives them."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for module in modules:
        inputs, outputs = SIZES[module.rsplit(".", 1)[-1]]
        for factor, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
            tensors[form.format(module, factor)] = rng.normal(size=shape).astype(np.float32)
    return tensors


def write(directory, fields, tensors):
    directory.mkdir(exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps(fields))
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory


def q_proj(layer, model="model"):
    return f"{model}.layers.{layer}.self_attn.q_proj"


def up_proj(layer):
    return f"model.layers.{layer}.mlp.up_proj"


def node_of(params, *path):
    for key in path:
        params = params[key]
    return params["smoa"]


def update(params, base, *path):
    for key in path:
        params, base = params[key], base[key]
    return np.asarray(merge_smoa({"x": params})["x"]["kernel"] - base["kernel"])


Q_PROJ = ("layers", "self_attn", "q_proj")
UP_PROJ = ("layers", "mlp", "up_proj")


@pytest.mark.parametrize(
    ("fields", "form"),
    [
        (LORA, "base_model.model.{}.lora_{}.weight"),
        (LORA, "base_model.model.{}.lora_{}.default.weight"),
        (LORA, "{}.lora_{}.french.weight"),
        (HIRA, "base_model.model.{}.hira_{}"),
        (HIRA, "base_model.model.{}.hira_{}.default"),
    ],
)
@pytest.mark.parametrize("model", ["model", "model.language_model", "language_model.model"])
def test_every_name_that_peft_has_written_is_understood(tmp_path, base, fields, form, model):
    tensors = factors(*(q_proj(layer, model) for layer in range(3)), form=form)
    params, config = import_peft(write(tmp_path, fields, tensors), base)
    assert config.modulation == ("none" if fields is LORA else "weight")
    assert (config.rank, config.target_modules, config.layers) == (2, ("q_proj",), ())
    node = node_of(params, *Q_PROJ)
    assert node.weight_modulated == (fields is HIRA)
    for layer in range(3):
        name = q_proj(layer, model)
        np.testing.assert_array_equal(node.a[layer].T, tensors[form.format(name, "A")])
        np.testing.assert_array_equal(node.b[layer], tensors[form.format(name, "B")])
    np.testing.assert_array_equal(node.scale, [2, 2, 2] if fields is LORA else [1, 1, 1])


def test_a_fresh_adapter_of_the_config_has_the_same_tree(tmp_path, base):
    tensors = factors(q_proj(1), up_proj(1), rank=3) | factors("lm_head", rank=5)
    params, config = import_peft(write(tmp_path, {**LORA, "lora_dropout": 0.25}, tensors), base)
    assert config == SmoaConfig.lora(
        3,
        alpha=4.0,
        layers=(1,),
        target_modules=("lm_head", "q_proj", "up_proj"),
        rank_pattern={"lm_head": 5},
        dropout=0.25,
    )
    fresh = apply_smoa(base, config, jax.random.key(0))
    assert jax.tree.structure(params) == jax.tree.structure(fresh)
    assert find_modulations(params).keys() == find_modulations(fresh).keys()
    for name, (_, node, _) in find_modulations(params).items():
        other = find_modulations(fresh)[name][1]
        assert [leaf.shape for leaf in jax.tree.leaves(node)] == [
            leaf.shape for leaf in jax.tree.leaves(other)
        ]
        np.testing.assert_array_equal(node.scale, other.scale)
        np.testing.assert_array_equal(node.ranks, other.ranks)
    np.testing.assert_array_equal(node_of(params, *Q_PROJ).ranks, [[0], [3], [0]])
    assert not node_of(params, *Q_PROJ).a[0].any()


def test_ranks_scales_and_layers_that_no_config_can_say_are_padded_and_folded(tmp_path, base):
    fields = {**LORA, "alpha_pattern": {"layers.2.mlp.up_proj": 9}}
    tensors = factors(q_proj(0), up_proj(1)) | factors(up_proj(2), rank=3)
    params, config = import_peft(write(tmp_path, fields, tensors), base)
    assert (config.alpha, config.layers) == (4.0, ())
    assert {config.rank, *config.rank_pattern.values()} == {2, 3}
    node = node_of(params, *UP_PROJ)
    np.testing.assert_array_equal(node.ranks, [[3], [3], [3]])
    assert not node.a[1, :, 2].any()
    assert not node.b[1, :, 2].any()
    assert not node_of(params, *Q_PROJ).a[1].any()
    for path, layer, name, scale in (
        (Q_PROJ, 0, q_proj(0), 4 / 2),
        (UP_PROJ, 1, up_proj(1), 4 / 2),
        (UP_PROJ, 2, up_proj(2), 9 / 3),
    ):
        a, b = (tensors[f"base_model.model.{name}.lora_{factor}.weight"] for factor in "AB")
        got = update(params, base, *path)
        np.testing.assert_allclose(got[layer], scale * (b @ a).T, atol=1e-5)
    assert not update(params, base, *UP_PROJ)[0].any()
    assert not update(params, base, *Q_PROJ)[1:].any()


def test_padding_that_an_import_leaves_gets_no_gradient(tmp_path, base):
    tensors = factors(q_proj(0)) | factors(q_proj(1), rank=3)
    params, _ = import_peft(write(tmp_path, LORA, tensors), base)
    module = params["layers"]["self_attn"]["q_proj"]

    def loss(module):
        return (merge_smoa({"x": module})["x"]["kernel"] ** 3).sum()

    gradient = jax.grad(loss)(module)["smoa"]
    assert gradient.a[1, :, 2].any()
    for factor in (gradient.a, gradient.b):
        assert not factor[0, :, 2].any()


def test_the_config_is_the_one_that_folds_least(tmp_path, base):
    pattern = {"q_proj": 7, "lm_head": 3}
    fields = {**LORA, "alpha_pattern": pattern}
    tensors = factors(q_proj(0), q_proj(1), q_proj(2), "lm_head")
    params, config = import_peft(write(tmp_path, fields, tensors), base)
    assert config.alpha == 7.0
    b = tensors["base_model.model.lm_head.lora_B.weight"]
    np.testing.assert_allclose(node_of(params, "lm_head").b, b * (3 / 7), rtol=1e-6)
    np.testing.assert_array_equal(
        node_of(params, *Q_PROJ).b[2], tensors[f"base_model.model.{q_proj(2)}.lora_B.weight"]
    )


def test_an_alpha_that_is_not_positive_is_folded_too(tmp_path, base):
    tensors = factors(q_proj(0))
    params, config = import_peft(write(tmp_path, {**LORA, "lora_alpha": -1}, tensors), base)
    assert config.alpha is None
    a, b = (tensors[f"base_model.model.{q_proj(0)}.lora_{factor}.weight"] for factor in "AB")
    np.testing.assert_allclose(update(params, base, *Q_PROJ)[0], -0.5 * (b @ a).T, atol=1e-5)


def test_bfloat16_factors_become_float32(tmp_path, base):
    rounded = {
        name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in factors(q_proj(0)).items()
    }
    params, _ = import_peft(write(tmp_path, LORA, rounded), base)
    node = node_of(params, *Q_PROJ)
    assert (node.a.dtype, node.b.dtype) == (np.float32, np.float32)
    name = f"base_model.model.{q_proj(0)}.lora_A.weight"
    np.testing.assert_array_equal(node.a[0].T, rounded[name].astype(np.float32))


def test_a_kernel_whose_name_ends_like_another_is_named_whole(tmp_path):
    base = {name: {"proj": {"kernel": np.ones((16, 16), np.float32)}} for name in ("a", "b")}
    rng = np.random.default_rng(0)
    tensors = {
        f"base_model.model.a.proj.lora_{factor}.weight": rng.normal(size=shape).astype(np.float32)
        for factor, shape in (("A", (2, 16)), ("B", (16, 2)))
    }
    directory = write(tmp_path, LORA, tensors)
    params, config = import_peft(directory, base, hf_module_name=lambda path, _: ".".join(path))
    assert config.target_modules == ("a.proj",)
    assert list(find_modulations(params)) == ["a.proj"]


def test_weights_beside_an_adapted_head_must_be_the_bases(tmp_path, base):
    name = "base_model.model.lm_head.base_layer.weight"
    head = np.asarray(base["lm_head"]["kernel"]).T.copy()
    tensors = factors("lm_head")
    import_peft(write(tmp_path, LORA, tensors | {name: head}), base)
    import_peft(write(tmp_path, LORA, tensors | {name: head.astype(ml_dtypes.bfloat16)}), base)
    for changed in (head + 0.1, np.concatenate([head, head[:1]])):
        with pytest.raises(CheckpointError, match=r"base_layer.*weights other than the base's"):
            import_peft(write(tmp_path, LORA, tensors | {name: changed}), base)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "ADALORA"}, "of type ADALORA; expected LORA or HIRA.*merge_and_unload"),
        ({"peft_type": None}, "of type None"),
        ({"use_dora": True}, "got use_dora=True; expected plain LoRA"),
        ({"bias": "all"}, "got bias='all'"),
        ({"lora_bias": True}, "got lora_bias=True"),
        ({"modules_to_save": ["lm_head"]}, r"got modules_to_save=\['lm_head'\]"),
        ({"fan_in_fan_out": True}, "got fan_in_fan_out=True"),
        ({"layer_replication": [[0, 2]]}, "got layer_replication"),
        ({"trainable_token_indices": [3]}, "got trainable_token_indices"),
        ({"target_parameters": ["experts.gate"]}, "got target_parameters"),
        ({"use_qalora": True, "alora_invocation_tokens": [1]}, "alora.*, use_qalora=True"),
        ({"loftq_config": {"loftq_bits": 4}}, "got loftq_config"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4', which changes the base"),
        ({"a_field_of_the_future": 1}, "got a_field_of_the_future=1"),
        ({"lora_alpha": "big"}, "lora_alpha 'big'; expected a number"),
        ({"alpha_pattern": {"(": 3}}, "alpha_pattern.*expected regular expressions"),
    ],
)
def test_an_adapter_that_is_more_than_its_factors_is_refused(tmp_path, base, fields, message):
    directory = write(tmp_path, {**LORA, **fields}, factors(q_proj(0)))
    with pytest.raises(CheckpointError, match=message):
        import_peft(directory, base)


def test_switches_that_are_off_and_plain_inits_are_no_obstacle(tmp_path, base):
    off = {"use_dora": False, "bias": "none", "loftq_config": {}, "modules_to_save": None}
    fields = {**LORA, **off, "init_lora_weights": "gaussian", "alpha_pattern": None}
    import_peft(write(tmp_path, fields, factors(q_proj(0))), base)


EMBEDDING = "base_model.model.model.embed_tokens.lora_embedding_A"
MAGNITUDE = f"base_model.model.{q_proj(0)}.lora_magnitude_vector"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({EMBEDDING: np.ones((2, 40), np.float32)}, "got .*lora_embedding_A; expected the two"),
        ({MAGNITUDE: np.ones(16, np.float32)}, "got .*lora_magnitude_vector; expected the two"),
        (
            factors(q_proj(1), form="base_model.model.{}.hira_{}"),
            "hira_A, .*hira_B; expected the two lora",
        ),
        (factors(q_proj(0), form="{}.lora_{}.other.weight"), "the adapters , other in one file"),
        (factors(q_proj(3)), r"on model.layers.3.self_attn.q_proj; expected one of this base's"),
        (factors("model.vision.q_proj"), "an adapter on model.vision.q_proj"),
        (
            {f"base_model.model.{q_proj(1)}.lora_A.weight": np.ones((2, 16), np.float32)},
            r"of shapes A \(2, 16\); expected A \(r, 16\) and B \(16, r\)",
        ),
        (
            {
                f"base_model.model.{q_proj(1)}.lora_A.weight": np.ones((0,), np.float32),
                f"base_model.model.{q_proj(1)}.lora_B.weight": np.ones((16, 2), np.float32),
            },
            r"of shapes A \(0,\) and B",
        ),
        (
            {
                f"base_model.model.{q_proj(1)}.lora_A.weight": np.ones((2, 16), np.int8),
                f"base_model.model.{q_proj(1)}.lora_B.weight": np.ones((16, 2), np.int8),
            },
            "stored as I8.*quantised",
        ),
    ],
)
def test_tensors_that_have_no_place_are_refused(tmp_path, base, tensors, message):
    directory = write(tmp_path, LORA, factors(q_proj(0)) | tensors)
    with pytest.raises(CheckpointError, match=message):
        import_peft(directory, base)


def test_a_tied_head_has_nothing_to_adapt(tmp_path, base):
    tied = {key: value for key, value in base.items() if key != "lm_head"}
    with pytest.raises(CheckpointError, match=r"on lm_head.*a tied head is none"):
        import_peft(write(tmp_path, LORA, factors("lm_head")), tied)


def test_pickles_and_incomplete_directories_are_refused(tmp_path, base):
    with pytest.raises(CheckpointError, match=r"without adapter_config.json; expected a dir"):
        import_peft(tmp_path, base)
    (tmp_path / "adapter_config.json").write_text(json.dumps(LORA))
    with pytest.raises(CheckpointError, match=r"no adapter_model.safetensors in it"):
        import_peft(tmp_path, base)
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(CheckpointError, match=r"a pickle, which can run code .* save_pretrained"):
        import_peft(tmp_path, base)
    save_file({}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="got no lora factors"):
        import_peft(tmp_path, base)


def test_an_adapted_base_is_refused(tmp_path, base):
    directory = write(tmp_path, LORA, factors(q_proj(0)))
    params, _ = import_peft(directory, base)
    with pytest.raises(CheckpointError, match="already hold an adapter"):
        import_peft(directory, params)


def test_an_adapter_on_the_hub_is_downloaded(tmp_path, base, monkeypatch):
    directory = write(tmp_path, LORA, factors(q_proj(0)))

    def download(name, *, weights):
        assert (name, weights) == ("organisation/adapter", True)
        return directory

    monkeypatch.setattr(peft_load, "download", download)
    _, config = import_peft("organisation/adapter", base)
    assert config.rank == 2
