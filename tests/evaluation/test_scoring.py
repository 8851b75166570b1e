"""Responses to questions: whose they are, where they end, and what they are scored against.

The oracle continues each prompt on its own, one full forward pass a token, without a cache, a batch
or padding before its tokens; so a response that strayed to another prompt, or that saw padding, is
another text.
"""

from __future__ import annotations

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smoa_jax.adapter.merge import merge_smoa
from smoa_jax.adapter.tree import find_modulations
from smoa_jax.data.encode import Questions
from smoa_jax.evaluation import scoring
from smoa_jax.evaluation.scoring import (
    answer_questions,
    check_questions,
    generation_params,
    respond,
)
from smoa_jax.models.decoder import Decoder
from smoa_jax.models.generation import GenerationConfig
from tests.data.families import word_tokenizer
from tests.models import tiny

LENGTHS = (7, 2, 18, 4, 11, 3, 5)
NEW_TOKENS = 6
PAD = 60


def make_tokenizer():
    """One word for each of the model's tokens."""
    found = word_tokenizer(" ".join(f"w{number}" for number in range(58)))
    assert len(found) == tiny.CONFIG.vocab_size
    return found


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def model():
    return tiny.model()


@pytest.fixture(scope="module")
def adapted():
    return tiny.adapt(tiny.params(), seed=2, b_std=0.5)


@pytest.fixture(scope="module")
def prompts():
    return [tiny.tokens(1, length, seed=length)[0] for length in LENGTHS]


@pytest.fixture(scope="module")
def continuations(model, adapted, prompts):
    """The greedy tokens after each prompt, as if nothing ended them."""
    found = []
    for prompt in prompts:
        ids = prompt.tolist()
        for _ in range(NEW_TOKENS):
            # Behind the tokens, where a causal model does not look: one shape, compiled once.
            row = np.asarray([ids + [0] * (32 - len(ids))], np.int32)
            logits = tiny.apply(model, adapted, row)
            ids.append(int(logits[0, len(ids) - 1].argmax()))
        found.append(ids[len(prompt) :])
    return found


def texts_of(tokenizer, continuations, eos=()):
    """What a reader is shown: up to an end, which itself is no text."""
    texts = []
    for ids in continuations:
        end = next((place for place, token in enumerate(ids) if token in eos), len(ids))
        texts.append(tokenizer.decode(ids[:end], skip_special_tokens=True).strip())
    return tuple(texts)


def config(**changes):
    return GenerationConfig(**{"max_new_tokens": NEW_TOKENS, "pad_id": PAD} | changes)


@pytest.mark.parametrize("batch_size", [2, 3, 9])
def test_responses_come_back_in_the_order_of_the_prompts(
    model, adapted, tokenizer, prompts, continuations, batch_size
):
    expected = texts_of(tokenizer, continuations)
    assert len(set(expected)) == len(expected)
    steps = []
    responses = respond(
        model,
        adapted,
        prompts,
        tokenizer,
        config(),
        batch_size=batch_size,
        progress=lambda *counts: steps.append(counts),
    )
    assert responses == expected
    # Every batch is reported once, and the last one counts its prompts, not its rows.
    ends = [*range(batch_size, len(prompts), batch_size), len(prompts)]
    assert steps == [(end, len(prompts)) for end in ends]


def test_prompts_of_like_length_share_a_batch_and_the_last_one_is_filled_up(
    model, adapted, tokenizer, prompts, monkeypatch
):
    batches = []
    real = scoring.generate

    def spy(model, params, tokens, lengths, config, key):
        batches.append((np.asarray(tokens), lengths.tolist()))
        return real(model, params, tokens, lengths, config, key)

    monkeypatch.setattr(scoring, "generate", spy)
    respond(model, adapted, prompts, tokenizer, config(), batch_size=3)
    assert [lengths for _, lengths in batches] == [[2, 3, 4], [5, 7, 11], [18, 18, 18]]
    for tokens, lengths in batches:
        assert tokens.shape == (3, max(lengths))
        for row, length in zip(tokens, lengths, strict=True):
            np.testing.assert_array_equal(row[:length], prompts[LENGTHS.index(length)])
            assert (row[length:] == PAD).all()


def test_a_response_ends_at_any_end_token_and_special_ones_are_not_shown(
    model, adapted, prompts, continuations
):
    # One row ends at once, others later, and some never.
    eos = (continuations[0][0], continuations[2][3])
    tokenizer = make_tokenizer()
    ends = [str(token) for token in tokenizer.convert_ids_to_tokens(list(eos))]
    expected = texts_of(tokenizer, continuations, eos)
    words = [len(text.split()) for text in expected]
    assert words[0] == 0
    assert max(words) == NEW_TOKENS
    assert len(set(words)) > 2
    shown = respond(model, adapted, prompts, tokenizer, config(eos_ids=eos), batch_size=3)
    for text, full, reached in zip(shown, expected, words, strict=True):
        assert text.removeprefix(full).split() in ([[end] for end in ends] + [[]]), text
        assert text.startswith(full)
        assert (text == full) == (reached == NEW_TOKENS)
    tokenizer.add_special_tokens({"additional_special_tokens": ends})
    hidden = respond(model, adapted, prompts, tokenizer, config(eos_ids=eos), batch_size=3)
    assert hidden == expected


def test_no_prompts_get_no_responses(model, adapted, tokenizer):
    assert respond(model, adapted, [], tokenizer, config(), batch_size=4) == ()


def test_sampling_is_a_function_of_the_key_and_batches_draw_apart(model, tokenizer):
    base = tiny.params()
    same = [tiny.tokens(1, 5)[0]] * 4

    def sampled(seed):
        return respond(
            model,
            base,
            same,
            tokenizer,
            config(temperature=3.0),
            batch_size=1,
            key=jax.random.key(seed),
        )

    assert sampled(0) == sampled(0)
    assert sampled(0) != sampled(1)
    assert len(set(sampled(0))) == 4
    with pytest.raises(ValueError, match="got no key with temperature"):
        respond(model, base, same, tokenizer, config(temperature=3.0), batch_size=1)


def test_float32_generates_with_the_merged_model(model, adapted):
    chosen = generation_params(model, adapted)
    assert not find_modulations(chosen)
    merged = merge_smoa(adapted)
    jax.tree.map(np.testing.assert_array_equal, chosen, merged)
    kernel = chosen["layers"]["mlp"]["up_proj"]["kernel"]
    assert not np.array_equal(kernel, adapted["layers"]["mlp"]["up_proj"]["kernel"])


def test_below_float32_the_adapted_model_itself_generates(model, adapted):
    half = Decoder(tiny.CONFIG, dtype=jnp.bfloat16)
    assert generation_params(half, adapted) is adapted
    layers = adapted["layers"]
    up = {**layers["mlp"]["up_proj"]}
    up["kernel"] = up["kernel"].astype(jnp.bfloat16)
    one_rounded = {
        **adapted,
        "layers": {**layers, "mlp": {**layers["mlp"], "up_proj": up}},
    }
    assert generation_params(model, one_rounded) is one_rounded
    base = tiny.params()
    assert generation_params(model, base) is base


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_respond_generates_with_the_params_chosen(adapted, tokenizer, prompts, monkeypatch, dtype):
    seen = []
    real = scoring.generate

    def spy(model, params, *arguments):
        seen.append(bool(find_modulations(params)))
        return real(model, params, *arguments)

    monkeypatch.setattr(scoring, "generate", spy)
    model = Decoder(tiny.CONFIG, dtype=dtype)
    respond(model, adapted, prompts[:2], tokenizer, config(), batch_size=2)
    assert seen == [dtype == jnp.bfloat16]


def questions_of(prompts, references):
    return Questions(
        prompts=tuple(prompts),
        questions=tuple(f"question {number}" for number in range(len(prompts))),
        references=tuple(references),
        counts=Counter(),
    )


def test_answers_are_scored_against_their_own_references(
    model, adapted, tokenizer, prompts, continuations
):
    right = texts_of(tokenizer, continuations, (tokenizer.eos_token_id,))
    wrong = {1, 4}
    references = ["no" if place in wrong else text for place, text in enumerate(right)]
    asked = {
        "max_new_tokens": NEW_TOKENS,
        "batch_size": 2,
        "protocol": "exact",
    }
    answers = answer_questions(
        model, adapted, questions_of(prompts, references), tokenizer, rows=7, **asked
    )
    assert answers.responses == right
    assert answers.score.right == tuple(place not in wrong for place in range(7))
    assert (answers.score.correct, answers.score.total) == (5, 7)
    # The first rows alone, however many there are.
    steps = []
    some = answer_questions(
        model,
        adapted,
        questions_of(prompts, references),
        tokenizer,
        rows=3,
        progress=lambda *counts: steps.append(counts),
        **asked,
    )
    assert some.responses == right[:3]
    assert some.score.right == (True, False, True)
    assert steps == [(2, 3), (3, 3)]


def test_answers_end_where_the_tokenizer_says_texts_end(
    model, adapted, tokenizer, prompts, continuations
):
    stops = tokenizer.init_kwargs
    stops["stop_token_ids"] = [continuations[0][2]]
    try:
        answers = answer_questions(
            model,
            adapted,
            questions_of(prompts[:1], ["a"]),
            tokenizer,
            rows=1,
            max_new_tokens=NEW_TOKENS,
            batch_size=1,
            protocol="exact",
        )
    finally:
        del stops["stop_token_ids"]
    end = continuations[0].index(continuations[0][2])
    assert answers.responses == texts_of(tokenizer, [continuations[0][: end + 1]])


def test_choices_are_those_of_the_task_where_it_is_known(model, adapted, tokenizer, monkeypatch):
    said = ("answer1, no: solution2", "it is true, so solution1")
    monkeypatch.setattr(scoring, "respond", lambda *_, **__: said)
    questions = questions_of([np.ones(2, np.int32)] * 2, ["solution2", "solution1"])
    asked = {"rows": 2, "max_new_tokens": 1, "batch_size": 2, "protocol": "choice"}
    any_label = answer_questions(model, adapted, questions, tokenizer, **asked)
    of_task = answer_questions(model, adapted, questions, tokenizer, task="piqa", **asked)
    assert (any_label.score.correct, of_task.score.correct) == (0, 2)


@pytest.mark.parametrize(
    ("rows", "protocol", "task", "message"),
    [
        (3, "exact", "", r"got 2 held-out questions; expected at least evaluation.rows=3"),
        (2, "number", "", r"got reference 'no number'; .* protocol number"),
        (2, "choice", "piqa", r"got reference '3 answer1' of task 'piqa'"),
        (2, "choice", "pica", r"got evaluation.task='pica'; .*did you mean piqa"),
        (2, "exact", "piqa", r"got evaluation.task='piqa' with evaluation.answer='exact'"),
        (0, "choice", "pica", r"got evaluation.task='pica'"),
    ],
)
def test_what_cannot_be_scored_is_refused_before_anything_is_generated(
    model, adapted, tokenizer, monkeypatch, rows, protocol, task, message
):
    monkeypatch.setattr(scoring, "generate", None)
    questions = questions_of([np.ones(2, np.int32)] * 2, ["3 answer1", "no number"])
    with pytest.raises(ValueError, match=message):
        check_questions(questions, rows, protocol, task)
    with pytest.raises(ValueError, match=message):
        answer_questions(
            model,
            adapted,
            questions,
            tokenizer,
            rows=rows,
            max_new_tokens=1,
            batch_size=1,
            protocol=protocol,
            task=task,
        )


def test_only_the_rows_that_are_scored_need_an_answer():
    questions = questions_of([np.ones(2, np.int32)] * 2, ["3 answer1", "no number"])
    check_questions(questions, 1, "number")
    check_questions(questions, 1, "choice", "ARC-Easy")
