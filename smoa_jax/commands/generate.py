"""Continue prompts."""

from __future__ import annotations

import sys
from typing import Any, Literal

import jax

from smoa_jax.checkpoint.native.directory import read_adapter
from smoa_jax.commands.tables import console, load
from smoa_jax.data.encode import encode_prompt
from smoa_jax.data.templates import make_template
from smoa_jax.data.tokenizer import load_tokenizer, special_ids
from smoa_jax.evaluation.scoring import respond
from smoa_jax.models.decoder import Decoder
from smoa_jax.models.generation import GenerationConfig
from smoa_jax.training.checks import check_vocabulary
from smoa_jax.training.model import resolve_dtype


def generate(
    *,
    model: str,
    prompt: list[str],
    adapter: str = "",
    template: Literal["auto", "alpaca", "chat", "plain"] = "auto",
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    num_beams: int = 1,
    seed: int = 0,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
) -> int:
    """Continue prompts.

    Args:
        model: Hugging Face directory or GGUF file.
        prompt: A prompt, or a list of them.
        adapter: Adapter directory; empty: the base alone.
        template: What the prompts are put into; auto: what the adapter was trained with, else the
            tokenizer's chat template if it has one, else plain.
        max_new_tokens: Longest response.
        temperature: 0: greedy.
        top_p: Share of probability that sampling keeps.
        num_beams: Above 1: beam search.
        seed: Of sampling.
        dtype: Of weights and activations; auto: float32 on CPU, else bfloat16.
    """
    if not prompt:
        raise ValueError("got no prompt; expected at least one; give --prompt 'a text'")
    numbers = resolve_dtype(dtype)
    base, params = load(model, adapter, numbers)
    tokenizer = load_tokenizer(base.source)
    note = ""
    if template == "auto":
        template, reason = _template(adapter, tokenizer)
        note = f"template: {template} ({reason}); --template chooses another"
    maker = make_template(template, tokenizer)
    ids = special_ids(tokenizer)
    prompts = [encode_prompt(text, tokenizer, maker) for text in prompt]
    largest = max(int(tokens.max(initial=0)) for tokens in prompts)
    check_vocabulary(largest, base.config.vocab_size, model)
    responses = respond(
        Decoder(config=base.config, dtype=numbers),
        params,
        prompts,
        tokenizer,
        GenerationConfig(
            max_new_tokens=max_new_tokens,
            eos_ids=ids.eos,
            pad_id=ids.pad,
            temperature=temperature,
            top_p=top_p,
            num_beams=num_beams,
        ),
        batch_size=len(prompt),
        key=jax.random.key(seed),
    )
    if note:
        print(note, file=sys.stderr)
    for text, response in zip(prompt, responses, strict=True):
        if len(prompt) > 1:
            console.print(f"> {text}", style="bold", markup=False)
        console.print(response, markup=False, soft_wrap=True)
    return 0


def _template(adapter: str, tokenizer: Any) -> tuple[Any, str]:
    """The template that suits an adapter or, without one, the tokenizer; and why."""
    trained_with = read_adapter(adapter).template if adapter else ""
    if trained_with:
        return trained_with, "the adapter was trained with it"
    if tokenizer.chat_template:
        return "chat", "the tokenizer has one"
    return "plain", "the tokenizer has no chat template"
