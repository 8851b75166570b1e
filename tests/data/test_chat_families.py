"""Chats of every family, token by token: what is given, what is learned, where generation stops."""

from __future__ import annotations

import pytest

from smoa_jax.data.chat import turn_shape
from smoa_jax.data.encode import encode_questions, encode_rows
from smoa_jax.data.rows import BadRowError, Conversation, Message, Row
from smoa_jax.data.templates import make_template
from smoa_jax.data.tokenizer import SpecialIds, special_ids
from tests.data import families


def conversation(*turns: str, system: str = "") -> Conversation:
    roles = ["user", "assistant"] * len(turns)
    messages = [Message(role=r, content=t) for r, t in zip(roles, turns, strict=False)]
    if system:
        messages.insert(0, Message(role="system", content=system))
    return Conversation(messages=tuple(messages), origin="test row")


def given(*tokens: str) -> list[tuple[str, int]]:
    return [(token, 0) for token in tokens]


def learned(*tokens: str) -> list[tuple[str, int]]:
    return [(token, 1) for token in tokens]


def encoded(row, tokenizer, template="chat"):
    """The row's tokens as strings, each with whether it trains; its prompt is their beginning."""
    render = make_template(template, tokenizer)
    tokens, trained = encode_rows([row], render, tokenizer, max_length=200)[0]
    prompt = encode_questions([row], render, tokenizer, max_length=200).prompts[0]
    assert tokens[: len(prompt)].tolist() == prompt.tolist()
    assert trained[len(prompt) - 1 : len(prompt) + 1].tolist() == [0, 1]
    words = tokenizer.convert_ids_to_tokens(tokens.tolist())
    return list(zip(words, trained.tolist(), strict=True))


def header(role: str) -> list[str]:
    return ["<|start_header_id|>", role, "<|end_header_id|>", "\n", "\n"]


#: Knows neither roles of its own nor a generation prompt.
BARE_GEMMA = (
    "{%- for message in messages %}{{- '<start_of_turn>' + message['role'] + '\\n' }}"
    "{{- message['content'] + '<end_of_turn>\\n' }}{%- endfor %}"
)
LLAMA3_SYSTEM = [
    *["<|begin_of_text|>", *header("system")],
    *["Today", " ", "Date:", " ", "26", " ", "Jul", " ", "2024", "\n", "\n"],
]


def test_llama3_trains_each_turn_up_to_its_eot():
    tokenizer = families.llama3("be hi hello bye ciao")
    row = conversation("hi", "hello", " bye\n", " ciao", system="be")
    assert encoded(row, tokenizer) == [
        *given(*LLAMA3_SYSTEM, "be", "<|eot_id|>"),
        *given(*header("user"), "hi", "<|eot_id|>"),
        *given(*header("assistant")),
        *learned("hello", "<|eot_id|>"),
        *given(*header("user"), "bye", "<|eot_id|>"),
        *given(*header("assistant")),
        *learned("ciao", "<|eot_id|>"),
    ]


def test_gemma3_trains_the_model_turns_and_opens_with_the_system_text():
    tokenizer = families.gemma("be hi hello bye ciao")
    row = conversation("hi", "hello", "bye", "ciao", system="be")
    assert encoded(row, tokenizer) == [
        *given("<bos>", "<start_of_turn>", "user", "\n", "be", "\n", "\n", "hi", "<end_of_turn>"),
        *given("\n", "<start_of_turn>", "model", "\n"),
        *learned("hello", "<end_of_turn>"),
        *given("\n", "<start_of_turn>", "user", "\n", "bye", "<end_of_turn>"),
        *given("\n", "<start_of_turn>", "model", "\n"),
        *learned("ciao", "<end_of_turn>"),
    ]


def test_gemma4_trains_the_model_turns_behind_a_system_turn():
    tokenizer = families.gemma("be hi hello bye ciao", chat_template=families.GEMMA4)
    row = conversation("hi", "hello", "bye", "ciao", system="be")
    assert encoded(row, tokenizer) == [
        *given("<bos>", "<|turn>", "system", "\n", "be", "<turn|>", "\n"),
        *given("<|turn>", "user", "\n", "hi", "<turn|>", "\n", "<|turn>", "model", "\n"),
        *learned("hello", "<turn|>"),
        *given("\n", "<|turn>", "user", "\n", "bye", "<turn|>", "\n"),
        *given("<|turn>", "model", "\n"),
        *learned("ciao", "<turn|>"),
    ]


def test_a_large_gemma4_is_given_its_empty_thought():
    tokenizer = families.gemma("hi hello bye ciao", chat_template=families.GEMMA4_LARGE)
    thought = ["<|channel>", "thought", "\n", "<channel|>"]
    assert encoded(conversation("hi", "hello"), tokenizer) == [
        *given("<bos>", "<|turn>", "user", "\n", "hi", "<turn|>", "\n"),
        *given("<|turn>", "model", "\n", *thought),
        *learned("hello", "<turn|>"),
    ]
    # An earlier reply stands in the prompt for the last one without a thought.
    assert encoded(conversation("hi", "hello", "bye", "ciao"), tokenizer) == [
        *given("<bos>", "<|turn>", "user", "\n", "hi", "<turn|>", "\n"),
        *given("<|turn>", "model", "\n"),
        *learned("hello", "<turn|>"),
        *given("\n", "<|turn>", "user", "\n", "bye", "<turn|>", "\n"),
        *given("<|turn>", "model", "\n", *thought),
        *learned("ciao", "<turn|>"),
    ]


def test_gemma2_refuses_a_system_message_in_its_own_words():
    tokenizer = families.gemma("be hi hello", chat_template=families.GEMMA2)
    assert encoded(conversation("hi", "hello"), tokenizer)[-2:] == learned("hello", "<end_of_turn>")
    row = conversation("hi", "hello", system="be")
    with pytest.raises(BadRowError, match="test row: the chat template refuses this row: System"):
        encoded(row, tokenizer)


def test_llama2_trains_replies_with_their_spaces_and_eos():
    tokenizer = families.llama2()
    inst, end_inst = ["\u2581[", "INST", "]"], ["\u2581[", "/INST", "]"]
    assert encoded(conversation("a", "b c", "d", "e"), tokenizer) == [
        *given("<s>", *inst, "\u2581a", *end_inst),
        *learned("\u2581b", "\u2581c", "\u2581", "</s>"),
        *given("<s>", *inst, "\u2581d", *end_inst),
        *learned("\u2581e", "\u2581", "</s>"),
    ]


def test_llama2_puts_the_system_text_inside_the_first_instruction():
    tokens = [token for token, _ in encoded(conversation("a", "b", system="c"), families.llama2())]
    system = ["\u2581", "<", "<", "S", "Y", "S", ">", ">", "<0x0A>", "c", "<0x0A>"]
    system += ["<", "<", "/", "S", "Y", "S", ">", ">", "<0x0A>", "<0x0A>"]
    assert tokens[1:] == [
        *["\u2581[", "INST", "]", *system, "a", "\u2581[", "/INST", "]"],
        *["\u2581b", "\u2581", "</s>"],
    ]


def test_chatml_trains_each_turn_though_its_end_is_also_padding():
    tokenizer = families.chatml("be hi hello bye ciao")
    row = conversation("hi", "hello", "bye", "ciao", system="be")
    assert encoded(row, tokenizer) == [
        *given("<|im_start|>", "system", "\n", "be", "<|im_end|>", "\n"),
        *given("<|im_start|>", "user", "\n", "hi", "<|im_end|>", "\n"),
        *given("<|im_start|>", "assistant", "\n"),
        *learned("hello", "<|im_end|>"),
        *given("\n", "<|im_start|>", "user", "\n", "bye", "<|im_end|>", "\n"),
        *given("<|im_start|>", "assistant", "\n"),
        *learned("ciao", "<|im_end|>"),
    ]


def test_qwen_2_trains_each_turn_behind_its_own_system_text_or_the_rows():
    tokenizer = families.qwen("be hi hello bye ciao")
    start = given("<|im_start|>", "system", "\n")
    own = given("You", " ", "are", " ", "Qwen", "<|im_end|>", "\n")
    turns = [
        *given("<|im_start|>", "user", "\n", "hi", "<|im_end|>", "\n"),
        *given("<|im_start|>", "assistant", "\n"),
        *learned("hello", "<|im_end|>"),
        *given("\n", "<|im_start|>", "user", "\n", "bye", "<|im_end|>", "\n"),
        *given("<|im_start|>", "assistant", "\n"),
        *learned("ciao", "<|im_end|>"),
    ]
    row = ("hi", "hello", "bye", "ciao")
    assert encoded(conversation(*row), tokenizer) == [*start, *own, *turns]
    said = [*start, *given("be", "<|im_end|>", "\n")]
    assert encoded(conversation(*row, system="be"), tokenizer) == [*said, *turns]


def test_qwen_3_is_given_its_empty_thoughts_and_learns_the_reply():
    tokenizer = families.qwen("hi hello bye ciao", chat_template=families.QWEN3)
    assert encoded(conversation("hi", "hello"), tokenizer) == [
        *given("<|im_start|>", "user", "\n", "hi", "<|im_end|>", "\n"),
        *given("<|im_start|>", "assistant", "\n", "<think>", "\n", "\n", "</think>", "\n", "\n"),
        *learned("hello", "<|im_end|>"),
    ]
    # An earlier reply stands in the prompt for the last one without its thoughts.
    assert encoded(conversation("hi", "hello", "bye", "ciao"), tokenizer) == [
        *given("<|im_start|>", "user", "\n", "hi", "<|im_end|>", "\n"),
        *given("<|im_start|>", "assistant", "\n"),
        *learned("hello", "<|im_end|>"),
        *given("\n", "<|im_start|>", "user", "\n", "bye", "<|im_end|>", "\n"),
        *given("<|im_start|>", "assistant", "\n", "<think>", "\n", "\n", "</think>", "\n", "\n"),
        *learned("ciao", "<|im_end|>"),
    ]


def test_mistral_trains_replies_with_their_spaces_and_eos():
    tokenizer = families.mistral("be hi hello bye ciao")
    assert encoded(conversation("hi", "hello", "bye", "ciao"), tokenizer) == [
        *given("<s>", "[INST]", " ", "hi", "[/INST]"),
        *learned(" ", "hello", "</s>"),
        *given("[INST]", " ", "bye", "[/INST]"),
        *learned(" ", "ciao", "</s>"),
    ]
    # It says a system text to the generation prompt alone, so no mask of it would be right.
    with pytest.raises(BadRowError, match=r"test row: .* its own text at message 3"):
        encoded(conversation("hi", "hello", system="be"), tokenizer)


def test_a_header_that_always_follows_is_neither_learned_nor_a_stop():
    """Llama 3's first chat template; the loss and the stop ids are those of the later one."""
    always, asked = (
        families.llama3("hi hello bye ciao", chat_template=template)
        for template in (families.LLAMA3_FIRST, families.LLAMA3)
    )
    assert turn_shape(always).tail == "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    assert special_ids(always) == special_ids(asked)
    for turns in (["hi", "hello"], ["hi", "hello", "bye", "ciao"]):
        assert encoded(conversation(*turns), always) == encoded(conversation(*turns), asked)


def test_a_template_without_generation_prompt_gives_its_header_and_learns_the_reply():
    tokenizer = families.gemma("assistant hi hello", chat_template=BARE_GEMMA)
    assert encoded(conversation("hi", "hello"), tokenizer) == [
        *given("<bos>", "<start_of_turn>", "user", "\n", "hi", "<end_of_turn>"),
        *given("\n", "<start_of_turn>", "assistant", "\n"),
        *learned("hello", "<end_of_turn>"),
    ]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (("message['content'] | trim", "'hidden'"), "does not write a reply once"),
        (("{{- bos_token }}", "{{- messages | length }}"), "does not write a reply once"),
        (("{{- bos_token }}", "{{- raise_exception('tools only') }}"), "refuses .*: tools only;"),
        (("{{- bos_token }}", "{{- nothing.at.all }}"), "refuses a plain exchange"),
    ],
)
def test_templates_that_cannot_be_cut_are_refused_when_asked_for(change, problem):
    tokenizer = families.gemma(chat_template=families.GEMMA3.replace(*change))
    with pytest.raises(ValueError, match=problem):
        make_template("chat", tokenizer)
    # Who does not use the template is not troubled by it.
    assert special_ids(tokenizer).eos == (tokenizer.eos_token_id,)


@pytest.mark.parametrize(
    "change",
    [
        # Leaves earlier replies out, as templates of reasoning models do with thoughts.
        ("message['content'] | trim", "message['content'] if role == 'user' or loop.last else ''"),
        # Ends the turns of longer chats otherwise.
        ("'<end_of_turn>\\n' }}", "'<end_of_turn>\\n' if loop.length < 3 else '' }}"),
    ],
)
def test_a_chat_whose_mask_would_be_wrong_is_refused(change):
    template = families.GEMMA3.replace(*change)
    assert template != families.GEMMA3
    tokenizer = families.gemma("True False a b c d", chat_template=template)
    assert encoded(conversation("a", "b"), tokenizer)[-2:] == learned("b", "<end_of_turn>")
    with pytest.raises(BadRowError, match=r"test row: .* its own text at message 4"):
        encoded(conversation("a", "b", "c", "d"), tokenizer)


def test_a_row_is_what_a_model_is_given_for_its_last_reply():
    template = families.GEMMA3.replace(
        "{{- bos_token }}", "{{- bos_token + (messages | length > 2) | string }}"
    )
    tokenizer = families.gemma("True False a b c d", chat_template=template)
    pairs = encoded(conversation("a", "b", "c", "d"), tokenizer)
    assert pairs[:2] == given("<bos>", "True")
    assert [token for token, trained in pairs if trained] == [
        "b",
        "<end_of_turn>",
        "d",
        "<end_of_turn>",
    ]


@pytest.mark.parametrize(
    "change",
    [
        # Shows the system message to a generation prompt alone.
        ("'\\n\\n' %}", "'\\n\\n' if messages[-1]['role'] == 'user' else '' %}"),
        # Does not end a turn that a system message has asked to go on.
        ("{{- '<end_of_turn>\\n' }}", "{{- '<end_of_turn>\\n' if role == 'user' or not prefix }}"),
    ],
)
def test_a_row_that_the_template_writes_otherwise_is_refused(change):
    template = families.GEMMA3.replace(*change)
    assert template != families.GEMMA3
    tokenizer = families.gemma("a b c", chat_template=template)
    reply = "b " * 20
    assert encoded(conversation("a", reply), tokenizer)[-2:] == learned("b", "<end_of_turn>")
    with pytest.raises(BadRowError, match=r"test row: .* its own text at message 3"):
        encoded(conversation("a", reply, system="c"), tokenizer)


def test_a_reply_that_the_template_leaves_out_is_refused():
    template = BARE_GEMMA.replace("messages %}", "messages if message['content'] != 'b' %}")
    tokenizer = families.gemma("assistant a b c", chat_template=template)
    assert encoded(conversation("a", "c"), tokenizer)[-2:] == learned("c", "<end_of_turn>")
    with pytest.raises(BadRowError, match=r"test row: .* its own text at message 2"):
        encoded(conversation("a", "b"), tokenizer)


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("{{- 1 / 0 }}", "ZeroDivisionError: division by zero"),
        ("{{- 'a'.index('z') }}", "substring not found"),
        ("{{- 2.0 ** 5000 }}", "OverflowError: "),
        ("{%- macro m() %}{{- m() }}{%- endmacro %}{{- m() }}", "RecursionError: "),
        ("{{- raise_exception('so it is') }}", "so it is"),
    ],
)
def test_whatever_a_template_raises_is_one_line(program, reason):
    on_bad = "{%- if messages[0]['content'] == 'bad' %}" + program + "{%- endif %}"
    tokenizer = families.gemma("hi hello bad", chat_template=on_bad + families.GEMMA3)
    assert encoded(conversation("hi", "hello"), tokenizer)
    refusal = f"test row: the chat template refuses this row: {reason}"
    with pytest.raises(BadRowError, match=refusal) as error:
        encoded(conversation("bad", "hello"), tokenizer)
    assert "\n" not in str(error.value)
    # One that fails at everything serves other templates, and is refused by name.
    tokenizer = families.gemma("hi hello", chat_template=program + families.GEMMA3)
    assert special_ids(tokenizer).eos == (tokenizer.eos_token_id,)
    with pytest.raises(ValueError, match=rf"refuses a plain exchange .*: {reason}") as error:
        make_template("chat", tokenizer)
    assert "\n" not in str(error.value)


def test_a_template_that_wants_a_system_message_serves_rows_that_have_one():
    demanding = "{%- if messages[0]['role'] != 'system' %}{{- raise_exception('no system') }}"
    tokenizer = families.gemma(
        "be hi hello", chat_template=demanding + "{%- endif %}" + families.GEMMA3
    )
    end = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert special_ids(tokenizer).eos == (tokenizer.eos_token_id, end)
    row = conversation("hi", "hello", system="be")
    assert encoded(row, tokenizer)[-2:] == learned("hello", "<end_of_turn>")
    with pytest.raises(BadRowError, match="no system"):
        encoded(conversation("hi", "hello"), tokenizer)


@pytest.mark.parametrize(
    ("tokenizer", "bos", "eos", "pad"),
    [
        (families.llama2(), "<s>", ["</s>"], "<unk>"),
        (families.llama2(None), "<s>", ["</s>"], "<unk>"),
        (families.llama3(), "<|begin_of_text|>", ["<|eot_id|>"], "<|finetune_right_pad_id|>"),
        (
            families.llama3(chat_template=None),
            "<|begin_of_text|>",
            ["<|end_of_text|>"],
            "<|finetune_right_pad_id|>",
        ),
        (families.gemma(), "<bos>", ["<eos>", "<end_of_turn>"], "<pad>"),
        (
            families.gemma(chat_template=families.GEMMA2),
            "<bos>",
            ["<eos>", "<end_of_turn>"],
            "<pad>",
        ),
        (families.gemma(chat_template=None), "<bos>", ["<eos>"], "<pad>"),
        (families.chatml(), None, ["<|im_end|>"], "<|im_end|>"),
        (families.qwen(), None, ["<|im_end|>"], "<|endoftext|>"),
        (families.mistral(), "<s>", ["</s>"], "<unk>"),
    ],
    ids=[
        "llama2",
        "llama2-base",
        "llama3",
        "llama3-base",
        "gemma3",
        "gemma2",
        "gemma-base",
        "smollm2",
        "qwen",
        "mistral",
    ],
)
def test_special_ids_are_those_that_the_makers_define(tokenizer, bos, eos, pad):
    size = len(tokenizer)
    ids = tokenizer.convert_tokens_to_ids
    expected = SpecialIds(bos=ids(bos) if bos else -1, eos=tuple(map(ids, eos)), pad=ids(pad))
    assert special_ids(tokenizer) == expected
    assert len(tokenizer) == size


@pytest.mark.parametrize("template", ["chat", "plain", "alpaca"])
@pytest.mark.parametrize("family", ["llama2", "llama3", "gemma", "mistral"])
def test_every_template_begins_with_one_bos_and_learns_an_end(family, template):
    tokenizer = getattr(families, family)()
    row = Row(instruction="a", output="b")
    pairs = encoded(row, tokenizer, template)
    assert [token for token, _ in pairs].count(tokenizer.bos_token) == 1
    assert pairs[0] == (tokenizer.bos_token, 0)
    last, trained = pairs[-1]
    assert trained
    assert tokenizer.convert_tokens_to_ids(last) in special_ids(tokenizer).eos
