"""Pieces of a text are tokenised as parts of it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers

from smoa_jax.data.encode import encode_rows
from smoa_jax.data.pieces import encode_pieces
from smoa_jax.data.rows import Row
from smoa_jax.data.templates import render_plain
from tests.data import families

LLAMA2 = families.llama2()


def pieces_of(tokenizer, *texts: str) -> list[list[str]]:
    [encoded] = encode_pieces(tokenizer, [texts])
    return [tokenizer.convert_ids_to_tokens(ids) for ids in encoded]


def test_a_piece_that_goes_on_gets_no_space_of_its_own():
    assert pieces_of(LLAMA2, "a", "b", " c") == [["\u2581a"], ["b"], ["\u2581c"]]
    assert pieces_of(LLAMA2, "", "a", "", "b") == [[], ["\u2581a"], [], ["b"]]


def test_a_piece_after_a_special_token_is_spaced_as_the_tokenizer_does():
    assert pieces_of(LLAMA2, "a</s>", "b", "<s>c") == [
        ["\u2581a", "</s>"],
        ["\u2581b"],
        ["<s>", "\u2581c"],
    ]


def test_a_response_begins_as_it_would_in_the_whole_text():
    """Llama 2 under a plain template: no token of a space between the line's end and the answer."""
    row = Row(instruction="a", output="b")
    tokens, trained = encode_rows([row], render_plain, LLAMA2, max_length=9)[0]
    assert LLAMA2.convert_ids_to_tokens(tokens.tolist()) == [
        "<s>",
        "\u2581a",
        "<0x0A>",
        "b",
        "</s>",
    ]
    assert trained.tolist() == [0, 0, 0, 1, 1]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text("ab \n", max_size=3) | st.sampled_from(["</s>", "<s>"]), max_size=6))
def test_pieces_joined_spell_the_whole_text(texts):
    [encoded] = encode_pieces(LLAMA2, [texts])
    whole = LLAMA2("".join(texts), add_special_tokens=False).input_ids
    joined = [token for ids in encoded for token in ids]
    assert "".join(LLAMA2.convert_ids_to_tokens(joined)) == "".join(
        LLAMA2.convert_ids_to_tokens(whole)
    )


@pytest.mark.parametrize("family", ["llama3", "gemma", "chatml"])
def test_tokenizers_without_such_a_space_need_no_anchor(family):
    tokenizer = getattr(families, family)("a b")
    assert pieces_of(tokenizer, "a", "b", " \n") == [["a"], ["b"], [" ", "\n"]]


def test_a_vocabulary_that_joins_every_anchor_is_refused():
    tokenizer = families.llama2()
    anchors = ["\n", "\x00", "\x01", "\ue000"]
    tokens = ["<unk>", "\u2581", "a", *anchors, *(f"{anchor}a" for anchor in anchors)]
    backend = tokenizer.backend_tokenizer
    backend.model = models.BPE({t: i for i, t in enumerate(tokens)}, [], unk_token="<unk>")
    backend.normalizer = normalizers.Prepend("\u2581")
    with pytest.raises(ValueError, match="joins each of '\\\\n'"):
        encode_pieces(tokenizer, [["a", "b"]])
