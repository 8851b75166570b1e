"""The real models at full size against transformers, on its weightless ``meta`` device.

The table of ``tests/models/real_configs.py`` is read by transformers' own config classes, and the
modules they build say which tensors there are: a second reading of every file, omissions included.
"""

from __future__ import annotations

import pytest

from smoa_jax.checkpoint.names import tensor_slots
from smoa_jax.models.params import abstract_params
from tests.models.real_configs import REAL_GEMMA4, REAL_MODELS

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity

every_model = pytest.mark.parametrize("name", REAL_MODELS)


def oracle_config(name: str):
    """The text part of the file, as transformers understands it."""
    fields = dict((REAL_MODELS | REAL_GEMMA4)[name].fields)
    config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    return config.get_text_config()


@pytest.mark.parametrize("name", REAL_MODELS | REAL_GEMMA4)
def test_every_tensor_has_the_name_and_the_shape_of_transformers_own(name):
    config = (REAL_MODELS | REAL_GEMMA4)[name].config
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(oracle_config(name))
    theirs = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    if config.tie_embeddings:
        assert theirs.pop("lm_head.weight") == (config.vocab_size, config.embed_dim)
    ours = {
        slot.name: slot.shape for slot in tensor_slots(abstract_params(config), config).values()
    }
    assert ours == theirs


@every_model
def test_every_option_is_read_as_transformers_reads_it(name):
    ours, theirs = REAL_MODELS[name].config, oracle_config(name)
    assert ours.head_dim == getattr(theirs, "head_dim", None) or ours.head_dim == (
        theirs.hidden_size // theirs.num_attention_heads
    )
    assert ours.max_positions == theirs.max_position_embeddings
    assert ours.norm_epsilon == theirs.rms_norm_eps
    assert ours.tie_embeddings == theirs.tie_word_embeddings
    rope = theirs.rope_parameters
    scaled = rope.get("full_attention", rope)
    assert ours.rope_base == scaled["rope_theta"]
    kind = ours.rope_scaling.kind
    assert ("default" if kind == "none" else kind) == scaled["rope_type"]
    if kind != "none":
        assert ours.rope_scaling.factor == scaled["factor"]
    local = [kind == "sliding_attention" for kind in getattr(theirs, "layer_types", None) or ()]
    if theirs.model_type == "mistral":  # whose layers are all of one kind
        local = [theirs.sliding_window is not None] * theirs.num_hidden_layers
    assert list(ours.local_layers) == (local if any(local) else [])
    if any(local):
        assert ours.sliding_window == theirs.sliding_window
    if any(local) and theirs.model_type != "mistral":
        assert ours.attention_scale == theirs.query_pre_attn_scalar**-0.5
        assert ours.local_rope_base == rope.get("sliding_attention", {}).get("rope_theta", 0.0)
        assert ours.attention_soft_cap == (theirs.attn_logit_softcapping or 0.0)
        assert ours.final_soft_cap == (theirs.final_logit_softcapping or 0.0)
