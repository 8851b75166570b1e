"""What a row looks like before a run: every token once, those that are learned between marks."""

from __future__ import annotations

import pytest

from smoa_jax.data.encode import encode_rows
from smoa_jax.data.preview import preview
from smoa_jax.data.rows import Conversation, Message, Row
from smoa_jax.data.templates import make_template


def conversation(*texts):
    roles = ("user", "assistant") * len(texts)
    messages = tuple(Message(role=r, content=t) for r, t in zip(roles, texts, strict=False))
    return Conversation(messages=messages, origin="here")


def shown(rows, template, tokenizer, index=0, **settings):
    examples = encode_rows(
        rows, make_template(template, tokenizer), tokenizer, max_length=64, **settings
    )
    return preview(examples, index, tokenizer)


def test_each_turn_that_is_learned_is_marked_with_its_end(smollm2):
    rows = [conversation("first", "one"), conversation("hello there", "good day", "and", "bye")]
    text = shown(rows, "chat", smollm2, 1)
    head, body = text.split("\n", 1)
    assert head.startswith("row 1: ")
    assert "\u27e6good day<|im_end|>\u27e7" in body
    assert body.endswith("\u27e6bye<|im_end|>\u27e7")
    assert body.count("\u27e6") == 2
    unmarked = body.replace("\u27e6", "").replace("\u27e7", "")
    assert "<|im_start|>user\nhello there<|im_end|>\n<|im_start|>assistant\ngood day" in unmarked


def test_an_end_that_the_template_does_not_write_is_shown(smollm2):
    text = shown([Row(instruction="2 + 2", output="4")], "plain", smollm2)
    assert text.split("\n", 1)[1] == "2 + 2\n\u27e64<|im_end|>\u27e7"
    everything = shown(
        [Row(instruction="2 + 2", output="4")], "plain", smollm2, response_only=False
    )
    assert everything.split("\n", 1)[1] == "\u27e62 + 2\n4<|im_end|>\u27e7"


def test_a_row_that_is_not_there_is_refused(smollm2):
    with pytest.raises(ValueError, match="got row 1; expected 0 to 0"):
        shown([Row(instruction="a", output="b")], "plain", smollm2, 1)
