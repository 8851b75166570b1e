"""Continue prompts."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Literal

import jax

from smoa_jax.checkpoint.native.directory import load_adapter, read_adapter
from smoa_jax.checks import require
from smoa_jax.commands.tables import console
from smoa_jax.data.config import TemplateChoice
from smoa_jax.data.encode import encode_open_row
from smoa_jax.data.rows import AnyRow, Conversation, Message, Row
from smoa_jax.data.templates import make_template
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
    system: str = "",
    chat: bool = False,
    adapter: str = "",
    checkpoint: str = "",
    template: TemplateChoice = "auto",
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
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
        model: Hugging Face directory, GGUF file, or a name on the hub.
        prompt: A prompt, or a list of them.
        system: What a conversation begins with, under the template chat.
        chat: Converse, line by line, under the template chat.
        adapter: Adapter directory, or a run's; empty: the base alone.
        checkpoint: best, last or a step's number, of the run that adapter names or lies in; empty:
            the adapter as it stands.
        template: What the prompts are put into; auto: what the adapter was trained with, else the
            tokenizer's chat template if it has one, else plain.
        max_new_tokens: Longest response.
        temperature: Of sampling; 0: greedy.
        top_k: Most probable tokens that sampling keeps; 0: all.
        top_p: Share of probability that sampling keeps.
        num_beams: Beams to search with; 1: none.
        seed: Of sampling.
        dtype: Of weights and activations; auto: float32 on CPU, else bfloat16.
        spectra_cache_dir: Where spectral bands are kept: auto, off or a directory.
        mesh: Devices to lay the weights out over; as it is, the run's own if that fits these
            devices, else all of them by fsdp.
        distributed: As in a run, for several processes.
    """
    require(
        bool(prompt) or chat,
        "no prompt",
        "at least one",
        "give --prompt 'a text', --prompt_file FILE, or --chat",
    )
    require(
        not (chat and prompt), "--chat with prompts", "one of them", "type them once it has begun"
    )
    require(
        bool(adapter) or not checkpoint, "--checkpoint without --adapter", "a run's directory there"
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
    needs_chat = "--chat" if chat else "--system" if system else ""
    require(
        template == "chat" or not needs_chat,
        f"{needs_chat} with the template {template}",
        "the template chat, which has turns",
        "leave it out, or say --template chat",
    )
    ids = special_ids(tokenizer)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_ids=ids.eos,
        pad_id=ids.pad,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        num_beams=num_beams,
    )
    maker = make_template(template, tokenizer)

    def answer(asked: list[AnyRow], key: jax.Array) -> tuple[str, ...]:
        prompts = [encode_open_row(row, tokenizer, maker) for row in asked]
        largest = max(int(tokens.max(initial=0)) for tokens in prompts)
        check_vocabulary(largest, base.config.vocab_size, model)
        return respond(
            loaded.model,
            params,
            prompts,
            tokenizer,
            config,
            batch_size=rows_for_mesh(len(prompts), loaded.mesh),
            key=key,
        )

    if chat:
        require(jax.process_count() == 1, "--chat in several processes", "one")
        return _converse(answer, jax.random.key(seed), system, note)
    responses = answer([_open_row(text, system) for text in prompt], jax.random.key(seed))
    if is_first():
        _show(prompt, responses, note)
    return 0


def _open_row(text: str, system: str, turns: tuple[Message, ...] = ()) -> AnyRow:
    """A row whose response is to be written: a prompt alone, or the next turn of a conversation."""
    if not system and not turns:
        return Row(instruction=text, output="", origin="prompt")
    start = (Message(role="system", content=system),) if system else ()
    asked = Message(role="user", content=text), Message(role="assistant", content="")
    return Conversation(messages=(*start, *turns, *asked), origin="prompt")


def _converse(
    answer: Callable[[list[AnyRow], jax.Array], tuple[str, ...]],
    key: jax.Array,
    system: str,
    note: str,
) -> int:
    """Read a line, answer it with all that was said before in mind, and so on to the end.

    Lines that nobody types on the screen are shown there, so that a transcript has both sides.
    """
    if note:
        print(note, file=sys.stderr)
    print("an empty line or end of input ends the conversation", file=sys.stderr)
    typed = sys.stdin.isatty()
    turns: tuple[Message, ...] = ()
    while True:
        try:
            text = input("> " if typed else "")
        except EOFError:
            return 0
        if not text.strip():
            return 0
        if not typed:
            console.print(f"> {text}", markup=False, soft_wrap=True)
        (response,) = answer([_open_row(text, system, turns)], jax.random.fold_in(key, len(turns)))
        console.print(response, markup=False, soft_wrap=True)
        said = Message(role="user", content=text), Message(role="assistant", content=response)
        turns = (*turns, *said)


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
