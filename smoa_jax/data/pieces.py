"""Texts in pieces become the token ids that the tokenizer would give the whole.

Pieces are tokenised one by one, so that no token spans a seam. Some tokenizers (Llama 2's and
others of SentencePiece) put a space before whatever they are given; a piece that goes on from
another would get one that the text does not have, and a response would learn to begin with two.
Such a piece is tokenised behind an *anchor*, the end of what precedes it, whose tokens are then
dropped.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerFast

from smoa_jax.data.chat import special_texts

#: Ordinary characters to stand for the text before a piece; a vocabulary rarely joins them to what
#: follows.
_ANCHORS = ("\n", "\x00", "\x01", "\ue000")


def encode_pieces(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[Sequence[str]]
) -> list[list[list[int]]]:
    """Ids of every piece of every text, in one call: the tokenizer works on many at once.

    No special tokens are added; those that the texts themselves spell are found.

    Raises:
        ValueError: The tokenizer puts a space before everything and joins every anchor to it.
    """
    flat = [piece for pieces in texts for piece in pieces]
    if not flat:
        return [[] for _ in texts]
    anchors = [""] * len(flat)
    if anchor := _anchor(tokenizer):
        specials = special_texts(tokenizer)
        anchors = [found for pieces in texts for found in _anchors(pieces, anchor, specials)]
    lead = {text: len(_ids(tokenizer, [text])[0]) if text else 0 for text in set(anchors)}
    encoded = _ids(tokenizer, [a + piece for a, piece in zip(anchors, flat, strict=True)])
    ids = (tokens[lead[a] :] for a, tokens in zip(anchors, encoded, strict=True))
    return [[next(ids) for _ in pieces] for pieces in texts]


def _anchors(pieces: Sequence[str], anchor: str, specials: Sequence[str]) -> list[str]:
    """What each piece is tokenised behind: nothing, a special token or ordinary text."""
    anchors: list[str] = []
    before = ""
    for piece in pieces:
        endings = [text for text in specials if before.endswith(text)]
        anchors.append(max(endings, key=len, default=anchor) if before else "")
        before = piece or before
    return anchors


def _anchor(tokenizer: PreTrainedTokenizerFast) -> str:
    """Ordinary text to put before a piece that goes on; empty where none is needed."""
    if _continuation(tokenizer, _ANCHORS[0], "a") == _ids(tokenizer, ["a"])[0]:
        return ""
    vocabulary = tokenizer.get_vocab()
    for anchor in _ANCHORS:
        last = tokenizer.convert_ids_to_tokens(_ids(tokenizer, [anchor])[0])[-1]
        if not any(text.startswith(last) and text != last for text in vocabulary):
            return anchor
    raise ValueError(
        "got a tokenizer that puts a space before every text and whose vocabulary joins each of "
        f"{', '.join(map(repr, _ANCHORS))} to what follows; expected one that keeps one of them "
        "apart"
    )


def _continuation(tokenizer: PreTrainedTokenizerFast, before: str, text: str) -> list[int]:
    first, both = _ids(tokenizer, [before, before + text])
    return both[len(first) :]


def _ids(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False).input_ids
