"""Batched generation with a key-value cache, compiled once per shape.

Everything between the padded prompts and the result is one jitted call: the prompts in one pass,
then one ``lax.while_loop`` that ends as soon as every row has met EOS. It compiles once per batch
size, prompt bucket, ``max_new_tokens``, number of beams and number of EOS ids, and whether it
samples; temperature and the like are data. A row's tokens do not depend on the other rows.

Example::

    config = GenerationConfig(max_new_tokens=32, eos_ids=(2,))
    result = generate(model, params, prompts, lengths, config)
    first = result.tokens[0, : result.lengths[0]]
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from smoa_jax.adapter.types import Params
from smoa_jax.checks import require
from smoa_jax.models.beam import NextLogits, beam_search
from smoa_jax.models.cache import KVCache, empty_cache
from smoa_jax.models.decoder import Decoder
from smoa_jax.models.sampling import is_any_of, row_keys, sample, truncated_logits

#: The narrowest bucket that prompts are padded to.
SMALLEST_BUCKET = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How to continue prompts.

    Temperature 0 takes the best token. ``num_beams`` above 1 searches with beams. ``top_k`` 0 and
    ``top_p`` 1 leave the distribution whole. ``pad_id`` fills rows after their end.
    """

    max_new_tokens: int
    eos_ids: tuple[int, ...] = ()
    pad_id: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    num_beams: int = 1
    length_penalty: float = 1.0

    def __post_init__(self) -> None:
        require(
            self.max_new_tokens >= 1 and self.num_beams >= 1,
            f"max_new_tokens {self.max_new_tokens} and num_beams {self.num_beams}",
            "at least 1 of each",
            "raise them",
        )
        require(
            self.temperature >= 0 and self.top_k >= 0 and 0 < self.top_p <= 1,
            f"temperature {self.temperature}, top_k {self.top_k}, top_p {self.top_p}",
            "temperature >= 0, top_k >= 0 and 0 < top_p <= 1",
            "correct them",
        )
        require(
            self.temperature != 0 or (self.top_k == 0 and self.top_p == 1),
            f"top_k {self.top_k} and top_p {self.top_p} at temperature 0",
            "neither when the best token is taken",
            "set a temperature, or leave them out",
        )
        require(
            self.temperature <= 0 or self.num_beams <= 1,
            f"temperature {self.temperature} and num_beams {self.num_beams}",
            "one of sampling and beam search",
            "set temperature 0 or num_beams 1",
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationResult:
    """New tokens, without the prompt: ``tokens[b, :lengths[b]]``, then ``pad_id``.

    ``finished`` rows end in an EOS id, which counts; others ran out of tokens. ``scores`` are
    log-probabilities under the model, with beams divided by ``length ** length_penalty``.
    """

    tokens: Int[Array, "B T"]
    lengths: Int[Array, " B"]
    finished: Bool[Array, " B"]
    scores: Float[Array, " B"]


def generate(
    model: Decoder,
    params: Params,
    prompts: ArrayLike,
    lengths: ArrayLike,
    config: GenerationConfig,
    key: jax.Array | None = None,
    *,
    padding: Literal["left", "right"] = "right",
) -> GenerationResult:
    """Continue a batch of prompts.

    Args:
        model: the decoder; its compute dtype is the cache's too.
        params: of the decoder, adapted or not.
        prompts: token ids [B, T], each row padded to T.
        lengths: number of real tokens in each row, at least 1.
        config: how to choose tokens, and when to stop.
        key: for sampling; required with a temperature, else unused.
        padding: on which side of the prompts the padding lies.

    Raises:
        ValueError: for prompts that are empty, of odd shapes, hold ids outside of the vocabulary
            or leave no room for the new tokens.
    """
    tokens, counts = np.asarray(prompts), np.asarray(lengths)
    _check_prompts(model, tokens, counts, config, padding)
    require(
        config.temperature <= 0 or key is not None,
        f"no key with temperature {config.temperature}",
        "one to sample with",
        "give a jax.random.key",
    )
    aligned, starts = _right_aligned(tokens, counts, padding, config.pad_id)
    settings = {
        "eos_ids": np.asarray(config.eos_ids, np.int32),
        "pad_id": np.int32(config.pad_id),
        "temperature": np.float32(config.temperature),
        "top_k": np.int32(config.top_k),
        "top_p": np.float32(config.top_p),
        "length_penalty": np.float32(config.length_penalty),
    }
    return _generate(
        model.clone(remat="none"),
        params,
        aligned,
        starts,
        settings,
        key if config.temperature > 0 else None,
        max_new_tokens=config.max_new_tokens,
        num_beams=config.num_beams,
    )


def prompt_bucket(length: int) -> int:
    """Return the width that prompts of at most ``length`` tokens are padded to: a power of two."""
    return max(SMALLEST_BUCKET, 1 << (length - 1).bit_length())


def _check_prompts(
    model: Decoder, tokens: np.ndarray, counts: np.ndarray, config: GenerationConfig, padding: str
) -> None:
    require(padding in ("left", "right"), f"padding {padding!r}", "'left' or 'right'", "choose one")
    require(
        tokens.ndim == 2 and counts.shape == tokens.shape[:1] and tokens.size > 0,
        f"prompts of shape {tokens.shape} and lengths of shape {counts.shape}",
        "(B, T) and (B,), neither empty",
        "pad the prompts to one width",
    )
    require(
        counts.min() >= 1 and counts.max() <= tokens.shape[1],
        f"prompt lengths from {counts.min()} to {counts.max()}",
        f"1 to the prompts' width of {tokens.shape[1]}",
        "leave empty prompts out",
    )
    require(
        tokens.min() >= 0 and tokens.max() < model.config.vocab_size,
        f"token ids from {tokens.min()} to {tokens.max()}",
        f"0 to {model.config.vocab_size - 1}",
        "use this model's own tokenizer",
    )
    longest = int(counts.max()) + config.max_new_tokens
    require(
        longest <= model.config.max_positions,
        f"a prompt of {counts.max()} tokens and {config.max_new_tokens} new ones",
        f"at most {model.config.max_positions} together",
        "shorten one of them",
    )


def _right_aligned(
    tokens: np.ndarray, counts: np.ndarray, padding: str, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Move every prompt to the right edge of the bucket; return them and each first slot."""
    width = prompt_bucket(int(counts.max()))
    aligned = np.full((tokens.shape[0], width), pad_id, np.int32)
    for row, (line, count) in enumerate(zip(tokens, counts, strict=True)):
        aligned[row, width - count :] = line[:count] if padding == "right" else line[-count:]
    return aligned, (width - counts).astype(np.int32)


@functools.partial(jax.jit, static_argnames=("model", "max_new_tokens", "num_beams"))
def _generate(
    model: Decoder,
    params: Params,
    tokens: Int[Array, "B T"],
    starts: Int[Array, " B"],
    settings: dict[str, Any],
    key: jax.Array | None,
    *,
    max_new_tokens: int,
    num_beams: int,
) -> GenerationResult:
    def extend(tokens: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
        """Return the logits after the last of some more tokens."""
        variables = {"params": params}
        hidden: Any
        logits: Any
        hidden, filled = model.apply(variables, tokens, cache=cache, method="hidden")
        logits = model.apply(variables, hidden[:, -1:], method="unembed")
        return logits[:, 0], cast(KVCache, filled)

    def next_logits(last: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
        return extend(last[:, None], cache)

    # The last new token is never fed back, so it needs no slot.
    num_slots = tokens.shape[1] + max_new_tokens - 1
    cache = empty_cache(model.config, starts, num_slots, model.dtype)
    logits, cache = extend(tokens, cache)
    if num_beams > 1:
        best = beam_search(
            next_logits,
            logits,
            cache,
            num_beams=num_beams,
            max_new_tokens=max_new_tokens,
            eos_ids=settings["eos_ids"],
            pad_id=settings["pad_id"],
            length_penalty=settings["length_penalty"],
        )
        return GenerationResult(tokens=best[0], lengths=best[1], finished=best[2], scores=best[3])
    keys = None if key is None else row_keys(key, tokens.shape[0])
    return _one_by_one(next_logits, logits, cache, settings, keys, max_new_tokens)


def _one_by_one(
    next_logits: NextLogits,
    logits: Float[Array, "B V"],
    cache: KVCache,
    settings: dict[str, Any],
    keys: jax.Array | None,
    max_new_tokens: int,
) -> GenerationResult:
    """Take the best token, or with keys a drawn one, until every row is finished."""
    result = _no_tokens(logits.shape[0], max_new_tokens, settings)
    result = _take(result, 0, logits, settings, keys)

    def going(state: tuple[jax.Array, GenerationResult, KVCache]) -> jax.Array:
        step, result, _ = state
        return (step < max_new_tokens) & ~jnp.all(result.finished)

    def body(
        state: tuple[jax.Array, GenerationResult, KVCache],
    ) -> tuple[jax.Array, GenerationResult, KVCache]:
        step, result, cache = state
        last = jax.lax.dynamic_index_in_dim(result.tokens, step - 1, axis=1, keepdims=False)
        logits, cache = next_logits(last, cache)
        return step + 1, _take(result, step, logits, settings, keys), cache

    return jax.lax.while_loop(going, body, (jnp.asarray(1), result, cache))[1]


def _no_tokens(batch: int, max_new_tokens: int, settings: dict[str, Any]) -> GenerationResult:
    return GenerationResult(
        tokens=jnp.full((batch, max_new_tokens), settings["pad_id"], jnp.int32),
        lengths=jnp.zeros(batch, jnp.int32),
        finished=jnp.zeros(batch, bool),
        scores=jnp.zeros(batch, jnp.float32),
    )


def _take(
    result: GenerationResult,
    step: int | jax.Array,
    logits: Float[Array, "B V"],
    settings: dict[str, Any],
    keys: jax.Array | None,
) -> GenerationResult:
    """Choose the token of ``step`` in every row that is still going."""
    if keys is None:
        chosen = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    else:
        kept = truncated_logits(
            logits, settings["temperature"], settings["top_k"], settings["top_p"]
        )
        chosen = sample(keys, jnp.asarray(step), kept)
    log_probabilities = jax.nn.log_softmax(logits, axis=-1)
    gained = jnp.take_along_axis(log_probabilities, chosen[:, None], axis=-1)[:, 0]
    going = ~result.finished
    tokens = jax.lax.dynamic_update_index_in_dim(
        result.tokens, jnp.where(going, chosen, settings["pad_id"]), step, axis=1
    )
    return GenerationResult(
        tokens=tokens,
        lengths=result.lengths + going,
        finished=result.finished | is_any_of(chosen, settings["eos_ids"]),
        scores=result.scores + jnp.where(going, gained, 0.0),
    )
