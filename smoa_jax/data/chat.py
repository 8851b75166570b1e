"""What a chat template writes around an assistant's words, found out by trying it.

A chat template is a program: which header it puts before an assistant's words, which token ends the
turn, and whether more follows can only be seen in what it writes. ``turn_shape`` renders one small
exchange and cuts it at the reply, so that a row's reply can be cut the same way, and so that
generation stops where a turn ends, whatever the tokenizer's own EOS is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

from jinja2 import TemplateError

from smoa_jax.checks import require

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

#: As chat templates read them: ``role`` and ``content``.
Messages: TypeAlias = Sequence[dict[str, str]]

#: Templates that print today's date would change the tokens of a run from one day to the next.
_FIXED_DATE = "26 Jul 2024"
#: No template writes this by itself, and none changes it by trimming.
_REPLY = "reply/8f3a"
_OTHER_TEMPLATE = "use template alpaca or plain"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TurnShape:
    """What stands around the assistant's words of a last turn.

    Attributes:
        head: Written before the words, but not by a generation prompt: where a template knows no
            generation prompt, the header of the turn; for Llama 2 a space.
        end: Written behind the words up to its special token: what a response learns to end with.
            Empty where the template ends turns with none.
        token: That special token; empty where there is none.
        tail: All that is written behind the words; begins with ``end``.
        primer: Written by a generation prompt alone, where a finished turn has nothing: the empty
            thought that the larger Gemma 4 are shown when they are asked for a reply.
    """

    head: str
    end: str
    token: str
    tail: str
    primer: str = ""


def turn_shape(tokenizer: PreTrainedTokenizerFast) -> TurnShape:
    """The shape of an assistant's turn under the tokenizer's chat template.

    Raises:
        ValueError: There is no chat template, or it refuses the simplest exchange, or changes or
            repeats the words of a reply.
    """
    require(
        bool(tokenizer.chat_template),
        "a tokenizer without a chat template",
        "one in chat_template.jinja or tokenizer_config.json",
        _OTHER_TEMPLATE,
    )
    prompt, whole = _probe(tokenizer)
    primer = ""
    if not whole.startswith(prompt):
        pairs = zip(prompt, whole, strict=False)
        shared = next((at for at, (one, other) in enumerate(pairs) if one != other), 0)
        if whole[shared:].startswith(_REPLY):
            prompt, primer = prompt[:shared], prompt[shared:]
    require(
        whole.startswith(prompt) and whole.count(_REPLY) == 1,
        "a chat template that does not write a reply once, behind its generation prompt",
        "one that only appends",
        _OTHER_TEMPLATE,
    )
    head, tail = whole[len(prompt) :].split(_REPLY)
    found = [
        (tail.index(text), -len(text), text) for text in special_texts(tokenizer) if text in tail
    ]
    if not found:
        return TurnShape(head=head, end=tail.rstrip(), token="", tail=tail, primer=primer)
    start, _, token = min(found)
    end = tail[: start + len(token)]
    return TurnShape(head=head, end=end, token=token, tail=tail, primer=primer)


def render_chat(
    tokenizer: PreTrainedTokenizerFast, messages: Messages, *, add_generation_prompt: bool
) -> str:
    """The text that the chat template makes of ``messages``, the same on every day.

    Raises:
        ValueError: The template refuses the messages; the message gives its reason.
    """
    try:
        text = tokenizer.apply_chat_template(
            list(messages),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            date_string=_FIXED_DATE,
        )
    except Exception as error:  # a template is a program: it may divide by zero, too
        reason = " ".join(str(error).split())
        # What a template or its engine says is said for people; the rest needs its kind.
        named = isinstance(error, TemplateError | TypeError | ValueError) and reason
        raise ValueError(reason if named else f"{type(error).__name__}: {reason}") from error
    return str(text)


def special_texts(tokenizer: PreTrainedTokenizerFast) -> tuple[str, ...]:
    """The texts of the special and other added tokens of ``tokenizer``."""
    added = (str(token) for token in tokenizer.added_tokens_decoder.values())
    texts = {*tokenizer.all_special_tokens, *added}
    return tuple(text for text in texts if text.strip())


def _probe(tokenizer: PreTrainedTokenizerFast) -> tuple[str, str]:
    """A generation prompt, and the same exchange with the reply.

    Tried without and with a system message: some templates demand one, some refuse it.
    """
    user, reply = {"role": "user", "content": "a"}, {"role": "assistant", "content": _REPLY}
    reason = ""
    for start in ([user], [{"role": "system", "content": "b"}, user]):
        try:
            return (
                render_chat(tokenizer, start, add_generation_prompt=True),
                render_chat(tokenizer, [*start, reply], add_generation_prompt=False),
            )
        except ValueError as error:
            reason = reason or str(error)
    raise ValueError(
        f"got a chat template that refuses a plain exchange of user and assistant: {reason}; "
        f"expected one that writes it; {_OTHER_TEMPLATE}"
    )
