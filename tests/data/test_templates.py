"""Masks token by token, and prompts that are the same in training and in generation."""

from __future__ import annotations

import numpy as np
import pytest

from smoa_jax.data.encode import encode_prompt, encode_questions, encode_rows
from smoa_jax.data.packing import make_batch, plan_rows
from smoa_jax.data.rows import BadRowError, Conversation, Message, Row, Text
from smoa_jax.data.templates import TEMPLATES, make_template, render_alpaca, render_plain

ALPACA_HEAD = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request."
)


def conversation(*turns: str, system: str = "") -> Conversation:
    roles = ["user", "assistant"] * len(turns)
    messages = [Message(role=r, content=t) for r, t in zip(roles, turns, strict=False)]
    if system:
        messages.insert(0, Message(role="system", content=system))
    return Conversation(messages=tuple(messages), origin="test row")


def encoded(rows, template, tokenizer, **options):
    """The tokens of the only row, as strings, each with whether it trains."""
    options = {"max_length": 200} | options
    examples = encode_rows(rows, template, tokenizer, **options)
    tokens, trained = examples[0]
    return list(
        zip(tokenizer.convert_ids_to_tokens(tokens.tolist()), trained.tolist(), strict=True)
    )


def test_alpaca_trains_on_response_and_eos_alone(make_tokenizer):
    row = Row(instruction="add one", output="two three")
    text = render_alpaca(row).prompt[0].text
    assert text == f"{ALPACA_HEAD}\n\n### Instruction:\nadd one\n\n### Response:\n"
    tokenizer = make_tokenizer(text, "two three")
    pairs = encoded([row], render_alpaca, tokenizer)
    assert pairs[-17:] == [
        ("###", 0),
        (" ", 0),
        ("Instruction:", 0),
        ("\n", 0),
        ("add", 0),
        (" ", 0),
        ("one", 0),
        ("\n", 0),
        ("\n", 0),
        ("###", 0),
        (" ", 0),
        ("Response:", 0),
        ("\n", 0),
        ("two", 1),
        (" ", 1),
        ("three", 1),
        ("<eos>", 1),
    ]
    assert not any(trained for _, trained in pairs[:-4])


def test_alpaca_shows_an_input_under_its_own_heading():
    text = render_alpaca(Row(instruction="Add.", input="1 and 2", output="3")).prompt[0].text
    assert text.startswith("Below is an instruction that describes a task, paired with an input")
    assert text.endswith("### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n")


def test_alpaca_leaves_braces_in_rows_alone():
    text = render_alpaca(Row(instruction="print {x} {0}", output="")).prompt[0].text
    assert "print {x} {0}" in text


def test_plain_puts_the_output_on_a_line_of_its_own(make_tokenizer):
    tokenizer = make_tokenizer("1 + 1 =\n2")
    row = Row(instruction="1 + 1 =", output="2")
    assert encoded([row], render_plain, tokenizer) == [
        ("1", 0),
        (" ", 0),
        ("+", 0),
        (" ", 0),
        ("1", 0),
        (" ", 0),
        ("=", 0),
        ("\n", 0),
        ("2", 1),
        ("<eos>", 1),
    ]


def test_plain_joins_prompt_and_completion_as_they_stand(make_tokenizer):
    tokenizer = make_tokenizer("yes: no")
    row = Row(instruction="yes:", output=" no", verbatim=True)
    assert encoded([row], render_plain, tokenizer) == [
        ("yes:", 0),
        (" ", 1),
        ("no", 1),
        ("<eos>", 1),
    ]


def chat_tokenizer(make_tokenizer, template, *texts):
    return make_tokenizer(
        "system user assistant \n",
        *texts,
        special={"eos_token": "<|im_end|>", "unk_token": "<unk>", "pad_token": "<|im_end|>"},
        extra_special=("<|im_start|>",),
        chat_template=template,
    )


def test_multi_turn_chat_trains_each_assistant_turn_with_its_end_token(make_tokenizer, chatml):
    tokenizer = chat_tokenizer(make_tokenizer, chatml, "be hi hello bye ciao")
    row = conversation("hi", "hello", "bye", "ciao", system="be")
    template = make_template("chat", tokenizer)
    assert encoded([row], template, tokenizer) == [
        ("<|im_start|>", 0),
        ("system", 0),
        ("\n", 0),
        ("be", 0),
        ("<|im_end|>", 0),
        ("\n", 0),
        ("<|im_start|>", 0),
        ("user", 0),
        ("\n", 0),
        ("hi", 0),
        ("<|im_end|>", 0),
        ("\n", 0),
        ("<|im_start|>", 0),
        ("assistant", 0),
        ("\n", 0),
        ("hello", 1),
        ("<|im_end|>", 1),
        ("\n", 0),
        ("<|im_start|>", 0),
        ("user", 0),
        ("\n", 0),
        ("bye", 0),
        ("<|im_end|>", 0),
        ("\n", 0),
        ("<|im_start|>", 0),
        ("assistant", 0),
        ("\n", 0),
        ("ciao", 1),
        ("<|im_end|>", 1),
    ]


def test_eos_is_trained_where_padding_equals_it(make_tokenizer, chatml):
    tokenizer = chat_tokenizer(make_tokenizer, chatml, "a b")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    examples = encode_rows(
        [Row(instruction="a", output="b")], render_plain, tokenizer, max_length=6
    )
    plan = plan_rows(examples, max_length=6)
    batch = make_batch(examples, plan, [0], length=6, batch_size=1)
    a, newline, b = tokenizer.convert_tokens_to_ids(["a", "\n", "b"])
    end = tokenizer.eos_token_id
    np.testing.assert_array_equal(batch["tokens"], [[a, newline, b, end, end, end]])
    np.testing.assert_array_equal(batch["targets"], [[newline, b, end, end, end, end]])
    np.testing.assert_array_equal(batch["loss_mask"], [[0, 1, 1, 0, 0, 0]])
    np.testing.assert_array_equal(batch["segment_ids"], [[1, 1, 1, 1, 0, 0]])


def test_chat_without_an_end_token_gets_eos(make_tokenizer):
    bare = (
        "{% for message in messages %}{{ message['role'] }} {{ message['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}"
    )
    tokenizer = make_tokenizer("user assistant a b\n", chat_template=bare)
    pairs = encoded([conversation("a", "b")], make_template("chat", tokenizer), tokenizer)
    assert pairs[-4:] == [("assistant", 0), (" ", 0), ("b", 1), ("<eos>", 1)]


@pytest.mark.parametrize("template_writes_bos", [False, True])
@pytest.mark.parametrize("adds_bos", [False, True])
def test_there_is_never_a_second_bos(make_tokenizer, chatml, template_writes_bos, adds_bos):
    tokenizer = make_tokenizer(
        "user assistant \n a b",
        special={"bos_token": "<bos>", "eos_token": "<|im_end|>", "unk_token": "<unk>"},
        extra_special=("<|im_start|>",),
        adds_bos=adds_bos,
        chat_template=("{{ bos_token }}" if template_writes_bos else "") + chatml,
    )
    template = make_template("chat", tokenizer)
    tokens = [token for token, _ in encoded([conversation("a", "b")], template, tokenizer)]
    assert tokens.count("<bos>") == int(adds_bos or template_writes_bos)
    assert tokens[tokens.count("<bos>")] == "<|im_start|>"
    questions = encode_questions([conversation("a", "b")], template, tokenizer, max_length=99)
    prompt = tokenizer.convert_ids_to_tokens(questions.prompts[0].tolist())
    assert prompt == tokens[: len(prompt)]
    assert tokens[len(prompt) :] == ["b", "<|im_end|>"]


def test_plain_text_gets_the_bos_that_the_tokenizer_writes(make_tokenizer):
    tokenizer = make_tokenizer(
        "a b\n",
        special={"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"},
        adds_bos=True,
    )
    pairs = encoded([Row(instruction="a", output="b")], render_plain, tokenizer)
    assert pairs == [("<bos>", 0), ("a", 0), ("\n", 0), ("b", 1), ("<eos>", 1)]


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_in_generation_are_the_prompts_of_training(smollm2, name):
    rows = [
        Row(instruction="rea", output="ding\n", verbatim=True),
        Row(instruction="12 + 5 =", output="17"),
        Row(instruction="Say \n\n", output="\n\n 7"),
    ]
    template = make_template(name, smollm2)
    examples = encode_rows(rows, template, smollm2, max_length=120)
    questions = encode_questions(rows, template, smollm2, max_length=120)
    for index, row in enumerate(rows):
        tokens, trained = examples[index]
        prompt = questions.prompts[index]
        np.testing.assert_array_equal(tokens[: len(prompt)], prompt)
        assert not trained[: len(prompt)].any()
        assert trained[len(prompt) :].all()
        if not row.verbatim:
            alone = encode_prompt(row.instruction, smollm2, template)
            np.testing.assert_array_equal(alone, prompt)


def test_tokenising_across_the_seam_would_change_the_prompt(smollm2):
    """The control of the test above: one of its rows does merge across the seam."""
    together = smollm2("reading", add_special_tokens=False).input_ids
    prompt = smollm2("rea", add_special_tokens=False).input_ids
    assert together[: len(prompt)] != prompt


def test_chat_pieces_are_the_tokens_of_the_rendered_chat(smollm2):
    row = conversation("What is 2 + 2?", "4.", "And 3 + 3?", "6.")
    messages = [{"role": m.role, "content": m.content} for m in row.messages]
    whole = smollm2.apply_chat_template(messages, tokenize=True)["input_ids"]
    template = make_template("chat", smollm2)
    tokens, _ = encode_rows([row], template, smollm2, max_length=200)[0]
    newline = smollm2("\n", add_special_tokens=False).input_ids
    assert [*tokens.tolist(), *newline] == whole
    prompt = smollm2.apply_chat_template(messages[:-1], add_generation_prompt=True)["input_ids"]
    questions = encode_questions([row], template, smollm2, max_length=200)
    assert questions.prompts[0].tolist() == prompt
    assert questions.references == ("6.",)


def test_a_template_that_rewrites_earlier_turns_is_refused(make_tokenizer):
    forgetful = (
        "{% for message in messages %}{{ message['role'] }}:"
        "{% if loop.last or message['role'] == 'user' %}{{ message['content'] }}{% endif %}\n"
        "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    tokenizer = make_tokenizer("a b c d", chat_template=forgetful)
    template = make_template("chat", tokenizer)
    encode_rows([conversation("a", "b")], template, tokenizer, max_length=50)
    rows = [conversation("a", "b"), conversation("a", "b", "c", "d")]
    with pytest.raises(BadRowError, match="test row: the chat template does not continue"):
        encode_rows(rows, template, tokenizer, max_length=50)
    kept = encode_rows(rows, template, tokenizer, max_length=50, on_bad_row="skip")
    assert len(kept) == 1
    assert kept.counts["bad_rows"] == 1


def test_a_template_that_prints_the_date_prints_the_same_every_day(make_tokenizer):
    dated = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}"
        "{% endif %}{{ date_string }}\n{{ messages[0]['content'] }}\n"
        "{% if messages|length > 1 %}{{ messages[1]['content'] }}{% endif %}"
    )
    tokenizer = make_tokenizer("26 Jul 2024 a b\n", chat_template=dated)
    pairs = encoded([conversation("a", "b")], make_template("chat", tokenizer), tokenizer)
    assert "".join(token for token, _ in pairs).startswith("26 Jul 2024\na")


def test_a_conversation_of_many_turns_needs_the_chat_template():
    rows = conversation("a", "b", "c", "d")
    for render in (render_alpaca, render_plain):
        with pytest.raises(BadRowError, match="got a conversation of user, assistant, user"):
            render(rows)
    assert render_plain(conversation("a", "b")).prompt[0].text == "a\n"


def test_training_on_everything_is_for_those_who_ask(make_tokenizer):
    tokenizer = make_tokenizer("a b\n")
    row = Row(instruction="a", output="b")
    pairs = encoded([row], render_plain, tokenizer, response_only=False)
    assert pairs == [("a", 1), ("\n", 1), ("b", 1), ("<eos>", 1)]


def test_a_prompt_that_fills_the_row_is_dropped_and_counted(make_tokenizer):
    tokenizer = make_tokenizer("a b\n")
    short, filling = Row(instruction="a", output="b"), Row(instruction="a b a", output="b")
    examples = encode_rows([short, filling], render_plain, tokenizer, max_length=6)
    assert len(examples) == 1
    assert examples.counts["prompt_too_long"] == 1
    questions = encode_questions([short, filling], render_plain, tokenizer, max_length=6)
    assert questions.questions == ("a",)
    assert questions.counts["prompt_too_long"] == 1
    longer = encode_rows([short, filling], render_plain, tokenizer, max_length=7)
    assert longer.counts["prompt_too_long"] == 0
    assert longer.counts["responses_truncated"] == 1
    assert longer[1][1].tolist() == [0, 0, 0, 0, 0, 0, 1]
    with pytest.raises(ValueError, match=r"got no usable row out of 1 .*prompt_too_long 1"):
        encode_rows([filling], render_plain, tokenizer, max_length=6)


def test_unknown_templates_and_missing_chat_templates_are_refused(make_tokenizer):
    with pytest.raises(ValueError, match="got template 'vicuna'; expected one of alpaca"):
        make_template("vicuna", make_tokenizer("a"))
    with pytest.raises(ValueError, match="tokenizer without a chat template"):
        make_template("chat", make_tokenizer("a"))


def test_a_bare_text_trains_from_its_first_word_to_its_last(make_tokenizer):
    tokenizer = make_tokenizer(
        "all of it\n",
        special={"bos_token": "<s>", "eos_token": "<eos>", "unk_token": "<unk>"},
        adds_bos=True,
    )
    row = Text(text="all of it", origin="x")
    assert encoded([row], render_plain, tokenizer) == [
        ("<s>", 0),
        ("all", 1),
        (" ", 1),
        ("of", 1),
        (" ", 1),
        ("it", 1),
        ("<eos>", 1),
    ]


@pytest.mark.parametrize("name", ["alpaca", "chat"])
def test_a_template_of_questions_refuses_a_bare_text(make_tokenizer, chatml, name):
    template = make_template(name, make_tokenizer("a", chat_template=chatml))
    with pytest.raises(BadRowError, match=f"x: got a bare text; template {name} expects"):
        template(Text(text="a", origin="x"))


def test_a_long_text_goes_on_in_further_examples_and_nothing_of_it_is_lost(make_tokenizer):
    words = " ".join("abcdefghijk")
    rows = [Text(text=words), Text(text="a b")]
    tokenizer = make_tokenizer(words)
    whole = encode_rows(rows, render_plain, tokenizer, max_length=999)
    cut = encode_rows(rows, render_plain, tokenizer, max_length=8)
    assert cut.tokens.tolist() == whole.tokens.tolist()
    assert cut.lengths.tolist() == [8, 8, 6, 4]
    assert (cut.counts["texts_divided"], cut.counts["responses_truncated"]) == (1, 0)
    # An example of one token would teach nothing: the first is nobody's target.
    assert encode_rows(rows[:1], render_plain, tokenizer, max_length=7).lengths.tolist() == [7] * 3
    assert len(encode_questions(rows, render_plain, tokenizer, max_length=8)) == 0
