"""Generation against the plainest reference: the whole text through the uncached model."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smoa_jax.models import generation
from smoa_jax.models.beam import beam_search
from smoa_jax.models.cache import empty_cache
from smoa_jax.models.decoder import Decoder
from smoa_jax.models.generation import GenerationConfig, generate, prompt_bucket
from smoa_jax.models.sampling import is_any_of, sample, truncated_logits
from tests.models import tiny

PROMPTS = tiny.tokens(3, 9, seed=4)
LENGTHS = np.array([3, 9, 1])
GREEDY = GenerationConfig(max_new_tokens=8)


def log_probabilities(model, params, text) -> np.ndarray:
    """Of the next token, by one pass over all of the text; causal, so padding is harmless."""
    padded = np.zeros((1, 24), np.int32)
    padded[0, : len(text)] = text
    logits = tiny.apply(model, params, padded)[0, len(text) - 1]
    return np.asarray(jax.nn.log_softmax(logits))


def greedy_reference(model, params, text, config) -> list[int]:
    new = []
    while len(new) < config.max_new_tokens and not (new and new[-1] in config.eos_ids):
        new.append(int(log_probabilities(model, params, [*text, *new]).argmax()))
    return new


def rows(result) -> list[list[int]]:
    return [
        [int(token) for token in line[:length]]
        for line, length in zip(result.tokens, result.lengths, strict=True)
    ]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_greedy_equals_the_uncached_model(family):
    config = tiny.FAMILIES[family]
    model = Decoder(config, dtype=jnp.float32)
    params = tiny.adapt(tiny.params_of(config), 3, b_std=0.3)
    result = generate(model, params, PROMPTS, LENGTHS, GREEDY)
    expected = [
        greedy_reference(model, params, list(line[:length]), GREEDY)
        for line, length in zip(PROMPTS, LENGTHS, strict=True)
    ]
    assert rows(result) == expected
    assert len({tuple(line) for line in expected}) == 3
    assert not result.finished.any()


def test_any_of_several_eos_ids_ends_a_row_and_only_that_row():
    model, params, key = tiny.model(), tiny.params(), jax.random.key(0)
    free = GenerationConfig(max_new_tokens=8, temperature=1.5)
    whole = rows(generate(model, params, PROMPTS, LENGTHS, free, key))
    eos_ids = tuple(next(t for t in line[1:] if t not in whole[2]) for line in whole[:2])
    config = dataclasses.replace(free, eos_ids=eos_ids, pad_id=60)
    result = generate(model, params, PROMPTS, LENGTHS, config, key)
    assert len(set(eos_ids)) == 2
    assert result.finished.tolist() == [True, True, False]
    for line, length, said in zip(result.tokens, result.lengths, whole, strict=True):
        ends = [index + 1 for index, token in enumerate(said) if token in eos_ids]
        assert length == (ends[0] if ends else 8)
        assert line[:length].tolist() == said[:length]
        assert (line[length:] == 60).all()


def test_the_loop_stops_when_every_row_has_met_eos():
    steps = []

    def count(x, names):
        if names[-1] == "vocab":
            jax.debug.callback(lambda: steps.append(1))
        return x

    model, params = dataclasses.replace(tiny.model(), constrain=count), tiny.params()
    free = generate(model, params, PROMPTS[:1], LENGTHS[:1], GREEDY)
    jax.effects_barrier()
    assert len(steps) == 8
    steps.clear()
    first_end = rows(free)[0].index(rows(free)[0][3]) + 1
    config = GenerationConfig(max_new_tokens=8, eos_ids=(rows(free)[0][3],))
    generate(model, params, PROMPTS[:1], LENGTHS[:1], config)
    jax.effects_barrier()
    assert len(steps) == first_end < 8


@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_padded_batch_equals_one_by_one_whatever_the_side(num_beams):
    model, params = tiny.model(), tiny.params()
    config = GenerationConfig(max_new_tokens=5, num_beams=num_beams, eos_ids=(7, 8))
    together = generate(model, params, PROMPTS, LENGTHS, config)
    left = np.stack(
        [np.roll(line, 9 - length) for line, length in zip(PROMPTS, LENGTHS, strict=True)]
    )
    from_left = generate(model, params, left, LENGTHS, config, padding="left")
    jax.tree.map(np.testing.assert_array_equal, together, from_left)
    alone = [
        generate(model, params, line[None, :length], [length], config)
        for line, length in zip(PROMPTS, LENGTHS, strict=True)
    ]
    assert rows(together) == [rows(result)[0] for result in alone]
    np.testing.assert_allclose(together.scores, [result.scores[0] for result in alone], rtol=1e-4)


def test_scores_are_the_log_probabilities_of_what_was_said():
    model, params = tiny.model(), tiny.params()
    result = generate(model, params, PROMPTS, LENGTHS, GREEDY)
    text, new = list(PROMPTS[0, :3]), rows(result)[0]
    expected = sum(
        log_probabilities(model, params, [*text, *new[:index]])[token]
        for index, token in enumerate(new)
    )
    np.testing.assert_allclose(result.scores[0], expected, rtol=1e-4)


def test_generation_compiles_once_per_bucket():
    model, params = tiny.model(tie_embeddings=True), tiny.params(tie_embeddings=True)

    def draw(length, temperature, seed):
        config = GenerationConfig(max_new_tokens=3, temperature=temperature, top_p=0.9)
        lengths = np.full(2, length)
        prompts = tiny.tokens(2, length, seed=seed)
        return generate(model, params, prompts, lengths, config, jax.random.key(seed))

    before = generation._generate._cache_size()
    draw(4, 0.7, 0)
    draw(13, 0.9, 1)
    # An equal model made anew, with another policy for training, is the same here.
    model = dataclasses.replace(tiny.model(tie_embeddings=True), remat="full")
    draw(16, 0.9, 2)
    assert generation._generate._cache_size() == before + 1
    draw(17, 0.9, 2)
    assert generation._generate._cache_size() == before + 2
    assert [prompt_bucket(length) for length in (1, 16, 17, 32, 33)] == [16, 16, 32, 32, 64]


def test_a_draw_depends_on_key_and_row_and_not_on_the_batch():
    model, params = tiny.model(), tiny.params()
    config = GenerationConfig(max_new_tokens=8, temperature=1.0)

    def draw(prompts, lengths, seed=0):
        return rows(generate(model, params, prompts, lengths, config, jax.random.key(seed)))

    same = np.repeat(PROMPTS[1:2], 3, axis=0)
    first = draw(same, [9, 9, 9])
    assert first == draw(same, [9, 9, 9])
    assert first != draw(same, [9, 9, 9], seed=1)
    assert len({tuple(line) for line in first}) == 3
    assert draw(same[:1], [9]) == first[:1]


def test_a_nucleus_or_a_k_of_the_best_alone_is_greedy():
    model, params = tiny.model(), tiny.params()
    greedy = rows(generate(model, params, PROMPTS, LENGTHS, GREEDY))
    for options in ({"top_k": 1}, {"top_p": 1e-6}):
        config = GenerationConfig(max_new_tokens=8, temperature=1.0, **options)
        drawn = generate(model, params, PROMPTS, LENGTHS, config, jax.random.key(0))
        assert rows(drawn) == greedy


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "expected"),
    [
        (1.0, 0, 1.0, [0.1, 0.5, 0.15, 0.25]),
        (1.0, 2, 1.0, [0, 2 / 3, 0, 1 / 3]),
        (1.0, 0, 0.5, [0, 1, 0, 0]),
        (1.0, 0, 0.51, [0, 2 / 3, 0, 1 / 3]),
        (1.0, 0, 0.76, [0, 5 / 9, 1.5 / 9, 2.5 / 9]),
        # Of the two that top_k leaves, the best has two thirds.
        (1.0, 2, 0.6, [0, 1, 0, 0]),
        (0.5, 0, 1.0, np.array([0.01, 0.25, 0.0225, 0.0625]) / 0.345),
    ],
)
def test_truncation_leaves_the_distribution_it_should(temperature, top_k, top_p, expected):
    logits = jnp.log(jnp.array([[0.1, 0.5, 0.15, 0.25]]))
    kept = truncated_logits(logits, jnp.float32(temperature), jnp.int32(top_k), jnp.float32(top_p))
    np.testing.assert_allclose(jax.nn.softmax(kept)[0], expected, atol=1e-6)
    keys = jax.random.split(jax.random.key(0), 4000)
    draws = sample(keys, jnp.int32(0), jnp.broadcast_to(kept, (4000, 4)))
    shares = np.bincount(draws, minlength=4) / 4000
    np.testing.assert_allclose(shares, expected, atol=0.03)
    assert (shares[np.asarray(expected) == 0] == 0).all()


def test_no_ids_match_no_token():
    tokens = jnp.array([[1, 2], [3, 4]])
    np.testing.assert_array_equal(is_any_of(tokens, jnp.array([4, 1])), [[1, 0], [0, 1]])
    assert not is_any_of(tokens, jnp.zeros(0, jnp.int32)).any()


# ------------------------------------------------------------------------------- beam search

SMALL = {"vocab_size": 5}


def sharpened(seed):
    """A tiny model over five tokens that has opinions, so that worths differ clearly."""
    params = tiny.params(seed, **SMALL)
    return {**params, "lm_head": {"kernel": 2.0 * params["lm_head"]["kernel"]}}


def best_of_all(model, params, text, config) -> tuple[list[int], float]:
    """Every text that could be said, and the one of the highest worth."""
    memo = {}

    def next_token(said):
        if said not in memo:
            memo[said] = log_probabilities(model, params, [*text, *said])
        return memo[said]

    candidates = []
    for length in range(1, config.max_new_tokens + 1):
        for said in itertools.product(range(5), repeat=length):
            ended = [token in config.eos_ids for token in said]
            if any(ended[:-1]) or not (ended[-1] or length == config.max_new_tokens):
                continue
            total = sum(next_token(said[:index])[token] for index, token in enumerate(said))
            candidates.append((total / length**config.length_penalty, list(said)))
    worth, said = max(candidates)
    return said, worth


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.5, -1.0])
def test_wide_beams_find_the_best_of_all_continuations(length_penalty):
    model = tiny.model(**SMALL)
    config = GenerationConfig(
        max_new_tokens=3, num_beams=25, eos_ids=(1, 3), length_penalty=length_penalty
    )
    prompts, lengths = tiny.tokens(4, 6, seed=2, vocab_size=5), np.array([6, 2, 4, 1])
    ends = set()
    for seed in range(3):
        params = sharpened(seed)
        result = generate(model, params, prompts, lengths, config)
        for row, length in enumerate(lengths):
            said, worth = best_of_all(model, params, list(prompts[row, :length]), config)
            assert rows(result)[row] == said
            np.testing.assert_allclose(result.scores[row], worth, rtol=1e-4)
            assert bool(result.finished[row]) == (said[-1] in config.eos_ids)
            ends.add(len(said))
    assert ends >= ({1, 3} if length_penalty == 1.0 else {1} if length_penalty <= 0 else {3})


def beam_reference(next_token, config) -> tuple[list[int], float]:
    """The search as the module describes it, one list of texts at a time, never stopping early.

    ``next_token`` gives the log-probabilities of the token after those said so far.
    """
    going, pool = [(0.0, [])], []

    def worth(total, said):
        return total / len(said) ** config.length_penalty

    for _ in range(config.max_new_tokens):
        candidates = [
            (total + gain, [*said, token])
            for total, said in going
            for token, gain in enumerate(next_token(said))
        ]
        candidates.sort(key=lambda candidate: -candidate[0])
        for total, said in candidates[: config.num_beams]:
            if said[-1] in config.eos_ids:
                pool.append((worth(total, said), said))
        pool = sorted(pool, key=lambda entry: -entry[0])[: config.num_beams]
        going = [c for c in candidates if c[1][-1] not in config.eos_ids][: config.num_beams]
    pool += [(worth(total, said), said) for total, said in going]
    value, said = max(pool, key=lambda entry: entry[0])
    return said, value


def test_narrow_beams_equal_the_search_in_plain_python():
    model, params = tiny.model(**SMALL), sharpened(0)
    config = GenerationConfig(max_new_tokens=6, num_beams=2, eos_ids=(1, 3))
    prompts = tiny.tokens(3, 9, seed=3, vocab_size=5)
    result = generate(model, params, prompts, LENGTHS, config)
    for row, length in enumerate(LENGTHS):
        text = list(prompts[row, :length])
        said, worth = beam_reference(
            lambda said, text=text: log_probabilities(model, params, [*text, *said]), config
        )
        assert rows(result)[row] == said
        np.testing.assert_allclose(result.scores[row], worth, rtol=1e-4)


@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 1.0, 2.0])
def test_beams_over_random_chains_equal_the_search_in_plain_python(length_penalty):
    """Where the next token depends on the last alone, many searches cost little."""
    rng = np.random.default_rng(0)
    chain = jax.nn.log_softmax(jnp.asarray(rng.normal(0, 2, (7, 7)), jnp.float32))
    first = jax.nn.log_softmax(jnp.asarray(rng.normal(0, 2, (200, 7)), jnp.float32))
    config = GenerationConfig(
        max_new_tokens=7, num_beams=2, eos_ids=(0, 4), length_penalty=length_penalty
    )

    def search(logits):
        return beam_search(
            lambda last, cache: (chain[last], cache),
            logits,
            empty_cache(tiny.CONFIG, jnp.zeros(logits.shape[0], jnp.int32), 1, jnp.float32),
            num_beams=2,
            max_new_tokens=7,
            eos_ids=jnp.array(config.eos_ids),
            pad_id=jnp.int32(6),
            length_penalty=jnp.float32(length_penalty),
        )

    tokens, lengths, finished, scores = together = search(first)
    # Each row in a loop of its own, which ends as soon as the row is settled.
    alone = jax.vmap(search)(first[:, None])
    for ours, own in zip(together, alone, strict=True):
        np.testing.assert_allclose(ours, own[:, 0], rtol=1e-5)
    rows_of_chain, starts = np.asarray(chain), np.asarray(first)
    for row in range(200):
        said, worth = beam_reference(
            lambda said, row=row: rows_of_chain[said[-1]] if said else starts[row], config
        )
        assert tokens[row, : lengths[row]].tolist() == said
        assert (tokens[row, lengths[row] :] == 6).all()
        assert bool(finished[row]) == (said[-1] in config.eos_ids)
        np.testing.assert_allclose(scores[row], worth, rtol=1e-4)


def test_beams_find_what_greedy_misses():
    model, params = tiny.model(), tiny.params()
    greedy = generate(model, params, PROMPTS, LENGTHS, GREEDY)
    config = GenerationConfig(max_new_tokens=8, num_beams=4, length_penalty=0.0)
    beams = generate(model, params, PROMPTS, LENGTHS, config)
    assert (np.asarray(beams.scores) >= np.asarray(greedy.scores) - 1e-4).all()
    assert rows(beams) != rows(greedy)


# --------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_new_tokens": 0}, "got max_new_tokens 0"),
        ({"num_beams": 0}, "num_beams 0"),
        ({"temperature": -1.0}, "got temperature -1.0"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p 0.0"),
        ({"top_k": 5}, "got top_k 5 and top_p 1.0 at temperature 0"),
        ({"temperature": 1.0, "num_beams": 2}, "expected one of sampling and beam search"),
    ],
)
def test_options_that_contradict_each_other_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        GenerationConfig(**{"max_new_tokens": 4, **fields})


@pytest.mark.parametrize(
    ("prompts", "lengths", "message"),
    [
        (PROMPTS[0], [3], r"got prompts of shape \(9,\)"),
        (PROMPTS, [3, 3], r"lengths of shape \(2,\)"),
        (PROMPTS, [3, 0, 1], "got prompt lengths from 0 to 3"),
        (PROMPTS, [3, 10, 1], "got prompt lengths from 1 to 10"),
        (PROMPTS + 61, [3, 9, 1], "expected 0 to 60"),
        (np.zeros((1, 121), int), [121], "got a prompt of 121 tokens and 8 new ones"),
    ],
)
def test_prompts_that_cannot_be_continued_are_refused(prompts, lengths, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny.model(), {}, prompts, lengths, GREEDY)


def test_sampling_without_a_key_and_unknown_padding_are_refused():
    config = GenerationConfig(max_new_tokens=4, temperature=1.0)
    with pytest.raises(ValueError, match=r"got no key with temperature 1\.0"):
        generate(tiny.model(), {}, PROMPTS, LENGTHS, config)
    with pytest.raises(ValueError, match="got padding 'middle'"):
        generate(tiny.model(), {}, PROMPTS, LENGTHS, GREEDY, padding="middle")
