from __future__ import annotations

import pytest

from smoa_jax.models.config import RopeScaling
from tests.models import tiny


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 0}, "got num_layers 0; expected a whole number of at least 1"),
        ({"vocab_size": 6.5}, "got vocab_size 6.5"),
        ({"num_kv_heads": 4}, "got num_heads 6 and num_kv_heads 4"),
        ({"head_dim": 5}, "got head_dim 5; expected an even size"),
        ({"activation": "relu"}, "got activation 'relu'"),
        ({"norm_epsilon": 0.0}, "norm_epsilon 0.0"),
        ({"attention_bias": "q"}, "got attention_bias 'q'; expected one of"),
        ({"pre_norms": False}, "got neither pre_norms nor post_norms"),
        ({"wide_qk_norm": True, "qk_norm": True}, "got both qk_norm and wide_qk_norm"),
        ({"rope_layers": (True, False)}, "rope_layers of 2 entries for 3 layers"),
    ],
)
def test_a_config_that_no_decoder_can_have_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny.config(**changes)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "yarn"}, "got RoPE scaling kind 'yarn'"),
        ({"kind": "linear", "factor": 0.0}, "expected a positive factor"),
        ({"factor": 8.0}, "kind 'none' with factor 8.0"),
        ({"kind": "llama3", "factor": 8.0, "low_freq_factor": 4.0}, "expected 0 < low < high"),
    ],
)
def test_a_rope_scaling_that_makes_no_sense_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        RopeScaling(**fields)


def test_a_config_can_be_a_static_argument():
    assert hash(tiny.config()) == hash(tiny.config())
    assert tiny.config() != tiny.config(num_layers=4)
