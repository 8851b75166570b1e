"""Prompt templates: a row becomes pieces of text, and each piece says whether it trains.

Pieces are tokenised one by one, so that two things hold by construction. The loss mask follows
*positions*: a padding token that is also the end token stays trained where it ends a response. And
the prompt's tokens in training equal those in generation, because both tokenise the same pieces;
tokenising prompt and response in one go may merge across the seam.

- ``alpaca``: the prompt of Alpaca and LLM-Adapters, which the SMoA and HiRA papers train with
  (written here without LLM-Adapters' stray indentation);
- ``chat``: the tokenizer's own chat template; every assistant turn trains, its end token included;
- ``plain``: instruction, newline, output; ``prompt/completion`` rows as they stand; bare texts,
  which no other template takes.
"""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias, get_args

from smoa_jax.checks import require_one_of
from smoa_jax.data.chat import render_chat, turn_shape
from smoa_jax.data.rows import AnyRow, BadRowError, Conversation, Message, Row, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

#: Names that ``make_template`` knows.
TemplateName: TypeAlias = Literal["alpaca", "chat", "plain"]
TEMPLATES: tuple[str, ...] = get_args(TemplateName)

_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
_ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """Text that is tokenised on its own. ``trained``: its tokens are learned as targets."""

    text: str
    trained: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rendered:
    """The pieces of one row.

    Attributes:
        prompt: What generation starts from.
        full: The whole training text; begins with the texts of ``prompt``.
        append_eos: The text does not write its own end: the EOS id comes after it, trained.
    """

    prompt: tuple[Piece, ...]
    full: tuple[Piece, ...]
    append_eos: bool


class Template(Protocol):
    """Renders a row. Raises ``BadRowError`` for a row that it cannot express."""

    def __call__(self, row: AnyRow) -> Rendered: ...


def make_template(name: str, tokenizer: PreTrainedTokenizerFast) -> Template:
    """The template called ``name``; only ``chat`` asks the tokenizer.

    Raises:
        ValueError: An unknown name, or ``chat`` with a tokenizer whose chat template is missing or
            cannot be cut at an assistant's turn.
    """
    require_one_of(TemplateName, name, "template ")
    if name == "chat":
        return ChatTemplate(tokenizer)
    return render_alpaca if name == "alpaca" else render_plain


def render_alpaca(row: AnyRow) -> Rendered:
    """Instruction, input if there is one, and response under Alpaca's headings."""
    row = _as_single_turn(row, "alpaca")
    pattern = _ALPACA_INPUT if row.input else _ALPACA
    return _prompt_and_response(
        pattern.format(instruction=row.instruction, input=row.input), row.output
    )


def render_plain(row: AnyRow) -> Rendered:
    """Instruction, input and output on lines of their own, or joined as they stand; or a text."""
    if isinstance(row, Text):
        return Rendered(prompt=(), full=(Piece(text=row.text, trained=True),), append_eos=True)
    row = _as_single_turn(row, "plain")
    prompt = row.instruction + (f"\n{row.input}" if row.input else "")
    return _prompt_and_response(prompt if row.verbatim else prompt + "\n", row.output)


def _prompt_and_response(prompt: str, response: str) -> Rendered:
    piece = Piece(text=prompt)
    return Rendered(
        prompt=(piece,), full=(piece, Piece(text=response, trained=True)), append_eos=True
    )


def _as_single_turn(row: AnyRow, template: str) -> Row:
    if isinstance(row, Row):
        return row
    if isinstance(row, Text):
        raise _without_question(row, template)
    if [message.role for message in row.messages] == ["user", "assistant"]:
        user, assistant = row.messages
        return Row(
            instruction=user.content,
            output=assistant.content,
            answer=row.answer,
            origin=row.origin,
        )
    roles = ", ".join(message.role for message in row.messages)
    raise BadRowError(
        f"{row.origin}: got a conversation of {roles}; template {template} expects one user and "
        "one assistant turn; use template chat"
    )


class ChatTemplate:
    """The tokenizer's chat template, cut at the assistant's turns.

    Turn i's response is what the template writes for the messages up to turn i beyond what it
    writes, with a generation prompt, for those before; it ends with the token that ends a turn.
    A template may write the last turn otherwise than earlier ones (Qwen 3 and the larger Gemma 4
    put thoughts, or none, before the last reply alone): the row is then what a model would be given
    for its last reply, and earlier ones are learned as they stand there. A template that cannot be
    cut so, or which ends a row's turns otherwise than that of the simplest exchange, is refused.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._shape = turn_shape(tokenizer)

    def __call__(self, row: AnyRow) -> Rendered:
        messages = _as_messages(row)
        pieces: list[Piece] = []
        written = ""
        for index, message in enumerate(messages):
            if message.role != "assistant":
                continue
            prompt, response = self._cut(messages[: index + 1], row.origin)
            if not prompt.startswith(written):
                pieces = self._seen_from_the_last(messages, row.origin)
                break
            pieces.append(Piece(text=prompt[len(written) :]))
            pieces.append(Piece(text=response, trained=True))
            written = prompt + response
        return Rendered(
            prompt=tuple(pieces[:-1]), full=tuple(pieces), append_eos=not self._shape.token
        )

    def _cut(self, messages: tuple[Message, ...], origin: str) -> tuple[str, str]:
        """The text before the words of the last message, and that message with its turn's end."""
        primer = self._shape.primer
        prompt = self._render(messages[:-1], origin, add_generation_prompt=True)
        prompt = prompt.removesuffix(primer)
        whole = self._render(messages, origin, add_generation_prompt=False)
        # A space belongs to the word behind it; all else of a header the model is given.
        head = self._shape.head.rstrip(" ")
        if whole.startswith(prompt + head):
            prompt += head
        words_end = len(whole) - len(self._shape.tail)
        if (
            not whole.startswith(prompt)
            or not whole.endswith(self._shape.tail)
            or words_end < len(prompt)
        ):
            raise self._not_appending(origin, len(messages) - 1)
        return prompt + primer, whole[len(prompt) : words_end] + self._shape.end

    def _seen_from_the_last(self, messages: tuple[Message, ...], origin: str) -> list[Piece]:
        """The pieces of a row whose earlier turns are written otherwise once another follows.

        Where they stand is found by writing marks in the place of their words.
        """
        replies = [at for at, message in enumerate(messages) if message.role == "assistant"]
        *earlier, last = replies
        prompt, response = self._cut(messages[: last + 1], origin)
        marks = {at: f"mark/{at:06x}/" for at in earlier}
        marked = tuple(
            dataclasses.replace(message, content=marks.get(at, message.content))
            for at, message in enumerate(messages[:last])
        )
        text = self._render(marked, origin, add_generation_prompt=True)
        head = self._shape.head.rstrip(" ")  # what ``_cut`` has added, if it has
        text += head if prompt.endswith(head) and not text.endswith(head) else ""
        parts = re.split("|".join(map(re.escape, marks.values())), text)
        end = self._shape.end
        for words in (
            [messages[at].content for at in earlier],
            [messages[at].content.strip() for at in earlier],
        ):
            written = [part for pair in zip(parts, [*words, ""], strict=False) for part in pair]
            if len(parts) == len(words) + 1 and "".join(written) == prompt:
                break
        else:
            raise self._not_appending(origin, last)
        if not all(part.startswith(end) for part in parts[1:]):
            raise self._not_appending(origin, last)
        pieces = [Piece(text=parts[0])]
        for reply, part in zip(words, parts[1:], strict=True):
            pieces.append(Piece(text=reply + end, trained=True))
            pieces.append(Piece(text=part[len(end) :]))
        return [*pieces, Piece(text=response, trained=True)]

    def _render(
        self, messages: tuple[Message, ...], origin: str, *, add_generation_prompt: bool
    ) -> str:
        plain: list[dict[str, str]] = [dataclasses.asdict(message) for message in messages]
        try:
            return render_chat(self._tokenizer, plain, add_generation_prompt=add_generation_prompt)
        except ValueError as error:
            raise BadRowError(f"{origin}: the chat template refuses this row: {error}") from error

    @staticmethod
    def _not_appending(origin: str, index: int) -> BadRowError:
        return BadRowError(
            f"{origin}: the chat template does not continue its own text at message {index + 1}; "
            "expected one that only appends; use template alpaca or plain, or single-turn rows"
        )


def _as_messages(row: AnyRow) -> tuple[Message, ...]:
    if isinstance(row, Conversation):
        return row.messages
    if isinstance(row, Text):
        raise _without_question(row, "chat")
    user = f"{row.instruction}\n\n{row.input}" if row.input else row.instruction
    return (Message(role="user", content=user), Message(role="assistant", content=row.output))


def _without_question(row: Text, template: str) -> BadRowError:
    return BadRowError(
        f"{row.origin}: got a bare text; template {template} expects a question and its answer; "
        "use template plain"
    )
