"""What PEFT wrote computes the same here, and again in PEFT after a round trip."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smoa_jax import merge_smoa
from smoa_jax.checkpoint.base import load_base
from smoa_jax.checkpoint.native.directory import load_adapter, read_adapter, save_adapter
from smoa_jax.checkpoint.peft.export import export_peft
from smoa_jax.checkpoint.peft.load import import_peft
from smoa_jax.checkpoint.peft.names import module_naming
from smoa_jax.cli import main
from smoa_jax.models.decoder import Decoder
from tests.parity.peft_models import (
    TOKENS,
    load_model,
    logits_of,
    peft,
    peft_logits,
    torch,
    write_adapter,
    write_llama,
)
from tests.parity.test_checkpoint_gemma import multimodal_model

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
    theirs = logits_of(write_adapter(load_model(checkpoint), CASES[name][0], tmp_path / "peft"))
    params, config = import_peft(tmp_path / "peft", base.params)
    assert {key: getattr(config, key) for key in CASES[name][1]} == CASES[name][1]
    ours = logits(params if name in ADAPTED_FORWARD else merge_smoa(params))
    assert np.abs(theirs - ours).max() < 1e-4
    assert np.abs(theirs - logits(base.params)).max() > 0.1

    where = {"base_fingerprint": base.fingerprint}
    save_adapter(params, config, tmp_path / "ours", base_name="tiny", **where)
    assert read_adapter(tmp_path / "ours").config == config
    again = load_adapter(tmp_path / "ours", base.params, **where)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, again, params)

    export_peft(again, config, tmp_path / "back", base_model_name=str(checkpoint))
    assert np.abs(peft_logits(checkpoint, tmp_path / "back")[0] - theirs).max() < 1e-4


def factors_of(model):
    """Every factor that training has moved, by the name that PEFT stores it under."""
    return {
        name: value.numpy()
        for name, value in peft.get_peft_model_state_dict(model).items()
        if not name.endswith("lora_B.weight") or value.any()
    }


def test_the_decoder_of_a_multimodal_model_is_met_by_its_own_names(tmp_path):
    """Its vision tower has modules that are named q_proj and v_proj too."""
    multimodal_model().save_pretrained(tmp_path / "base")
    text_only = r"model\.language_model\..*\.(q_proj|v_proj|down_proj)"
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=text_only)
    theirs = write_adapter(multimodal_model(), config, tmp_path / "peft")
    base = load_base(tmp_path / "base")
    params, ours = import_peft(tmp_path / "peft", base.params)
    assert ours.target_modules == ("down_proj", "q_proj", "v_proj")

    tokens = TOKENS % 90  # none of the image's own
    with torch.no_grad():
        wanted, plain = (
            model(torch.tensor(tokens)).logits.numpy() for model in (theirs, multimodal_model())
        )
    apply = jax.jit(Decoder(base.config, dtype=jnp.float32).apply)
    assert np.abs(np.asarray(apply({"params": params}, tokens)) - wanted).max() < 1e-4
    assert np.abs(plain - wanted).max() > 0.1

    where = module_naming(base.hf_config)
    export_peft(params, ours, tmp_path / "back", base_model_name="tiny", hf_module_name=where)
    opened = peft.PeftModel.from_pretrained(multimodal_model(), tmp_path / "back")
    adapted = [name for name, _ in opened.named_modules() if name.endswith("base_layer")]
    assert len(adapted) == 9
    assert not [name for name in adapted if "vision" in name]
    written, again = factors_of(theirs), factors_of(opened)
    assert again.keys() == written.keys()
    for name, value in written.items():
        np.testing.assert_array_equal(again[name], value)


def test_smoa_import_writes_an_adapter_that_the_other_commands_take(checkpoint, tmp_path, capsys):
    write_adapter(load_model(checkpoint), lora(lora_dropout=0.1), tmp_path / "peft")
    paths = [f"--model={checkpoint}", f"--peft={tmp_path / 'peft'}", f"--output={tmp_path / 'out'}"]
    assert main(["import", *paths]) == 0
    assert "LoRA of rank 6 on 5 kernels" in " ".join(capsys.readouterr().out.split())
    assert read_adapter(tmp_path / "out").config.dropout == 0.1
    arguments = ["export", f"--model={checkpoint}", f"--adapter={tmp_path / 'out'}"]
    assert main([*arguments, f"--output={tmp_path / 'back'}", "--format=peft"]) == 0
    both = [peft_logits(checkpoint, tmp_path / name)[0] for name in ("peft", "back")]
    assert np.abs(both[0] - both[1]).max() < 1e-4

    assert main(["import", *paths]) == 2
    assert "already exists" in capsys.readouterr().err
    elsewhere = f"--output={tmp_path / 'elsewhere'}"
    assert main(["import", paths[0], f"--peft={checkpoint}", elsewhere]) == 2
    assert "without adapter_config.json" in capsys.readouterr().err
