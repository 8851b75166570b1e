"""Continue prompts."""

from __future__ import annotations

import sys
from typing import Any, Literal

import jax

from smoa_jax.checkpoint.native.directory import load_adapter, read_adapter
from smoa_jax.checks import require
from smoa_jax.commands.tables import console
from smoa_jax.data.encode import encode_prompt
from smoa_jax.data.templates import TemplateName, make_template
from smoa_jax.data.tokenizer import load_tokenizer, special_ids
from smoa_jax.evaluation.scoring import respond
from smoa_jax.models.generation import GenerationConfig
from smoa_jax.sharding.mesh import MeshConfig, rows_for_mesh
from smoa_jax.sharding.processes import DistributedConfig, initialize, is_first
from smoa_jax.sharding.rules import DECODER_RULES
from smoa_jax.training.checks import check_vocabulary
from smoa_jax.training.model import load_generator, resolve_dtype, spectra_cache
from smoa_jax.training.saved_adapter import adapter_directory, run_settings


def generate(
    *,
    model: str,
    prompt: list[str],
    adapter: str = "",
    checkpoint: str = "",
    template: Literal["auto", TemplateName] = "auto",
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    num_beams: int = 1,
    seed: int = 0,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    spectra_cache_dir: str = "auto",
    mesh: MeshConfig = MeshConfig(),  # noqa: B008 (frozen)
    distributed: DistributedConfig = DistributedConfig(),  # noqa: B008 (frozen)
) -> int:
    """Continue prompts.

    Args:
        model: Hugging Face directory or GGUF file.
        prompt: A prompt, or a list of them.
        adapter: Adapter directory, or a run's; empty: the base alone.
        checkpoint: best, last or a step's number, of the run that adapter names or lies in; empty:
            the adapter as it stands.
        template: What the prompts are put into; auto: what the adapter was trained with, else the
            tokenizer's chat template if it has one, else plain.
        max_new_tokens: Longest response.
        temperature: 0: greedy.
        top_p: Share of probability that sampling keeps.
        num_beams: Above 1: beam search.
        seed: Of sampling.
        dtype: Of weights and activations; auto: float32 on CPU, else bfloat16.
        spectra_cache_dir: Where spectral bands are kept: auto, off or a directory.
        mesh: Devices to lay the weights out over; as it is, the run's own if that fits these
            devices, else all of them by fsdp.
        distributed: As in a run, for several processes.
    """
    require(bool(prompt), "no prompt", "at least one", "give --prompt 'a text'")
    require(
        bool(adapter) or not checkpoint,
        "--checkpoint without --adapter",
        "a run's directory there",
    )
    initialize(distributed)
    numbers = resolve_dtype(dtype)
    settings = run_settings(adapter) if adapter else {}
    mesh_config = _fitting(settings, jax.device_count()) if mesh == MeshConfig() else mesh
    rules = settings.get("model", {}).get("sharding_rules") or DECODER_RULES
    loaded = load_generator(model, numbers, mesh_config, rules)
    base, params = loaded.base, loaded.base.params
    trained_with = ""
    if adapter:
        with adapter_directory(adapter, checkpoint, model) as directory:
            trained_with = read_adapter(directory).template
            params = load_adapter(
                directory,
                params,
                base_fingerprint=base.fingerprint,
                cache_dir=spectra_cache(spectra_cache_dir),
            )
    tokenizer = load_tokenizer(base.source)
    note = ""
    if template == "auto":
        template, reason = _template(trained_with, tokenizer)
        note = f"template: {template} ({reason}); --template chooses another"
    maker = make_template(template, tokenizer)
    ids = special_ids(tokenizer)
    prompts = [encode_prompt(text, tokenizer, maker) for text in prompt]
    largest = max(int(tokens.max(initial=0)) for tokens in prompts)
    check_vocabulary(largest, base.config.vocab_size, model)
    responses = respond(
        loaded.model,
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
        batch_size=rows_for_mesh(len(prompt), loaded.mesh),
        key=jax.random.key(seed),
    )
    if is_first():
        _show(prompt, responses, note)
    return 0


def _show(prompts: list[str], responses: tuple[str, ...], note: str) -> None:
    if note:
        print(note, file=sys.stderr)
    for text, response in zip(prompts, responses, strict=True):
        if len(prompts) > 1:
            console.print(f"> {text}", style="bold", markup=False)
        console.print(response, markup=False, soft_wrap=True)


def _fitting(settings: dict[str, Any], num_devices: int) -> MeshConfig:
    """The mesh of a run if so many devices can form it, else all of them by fsdp."""
    own = MeshConfig(**settings.get("mesh", {}))
    return own if own.fits(num_devices) else MeshConfig()


def _template(trained_with: str, tokenizer: Any) -> tuple[Any, str]:
    """The template that suits an adapter or, without one, the tokenizer; and why."""
    if trained_with:
        return trained_with, "the adapter was trained with it"
    if tokenizer.chat_template:
        return "chat", "the tokenizer has one"
    return "plain", "the tokenizer has no chat template"
