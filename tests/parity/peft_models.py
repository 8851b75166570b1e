"""A tiny Llama of transformers and what PEFT makes of it, for the tests of both directions."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

SIZES = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
TOKENS = np.random.default_rng(0).integers(0, 96, (2, 16))


def write_llama(directory):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    model.save_pretrained(directory)
    return directory


def load_model(directory):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory,
        attn_implementation="eager",  # the only one with Gemma 2's soft cap
    )
    return model.eval()


def logits_of(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def peft_logits(checkpoint, directory):
    """The logits of an adapter that PEFT opens, and how many modules it adapts."""
    model = peft.PeftModel.from_pretrained(load_model(checkpoint), directory)
    adapted = [name for name, _ in model.named_modules() if name.endswith("base_layer")]
    return logits_of(model), len(adapted)


def write_adapter(base, config, directory, seed=1):
    """PEFT's own adapter with random factors, written by PEFT; the adapted model."""
    model = peft.get_peft_model(base, config).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "hira_" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(directory)
    return model
