"""Tokenizers from a Hugging Face directory or from a GGUF file, without torch and without network.

Two things go wrong quietly with tokenizers, and are settled here once:

- *Which ids end a text.* A model may stop at several tokens (``<|end_of_text|>`` and
  ``<|eot_id|>``; ``<eos>`` and ``<end_of_turn>``): they are gathered from the tokenizer, from
  ``generation_config.json`` (or ``config.json``), from the GGUF's metadata and from what the chat
  template writes after an assistant's turn.
- *Whether texts begin with BOS.* It is tried on the tokenizer itself instead of believed from a
  flag, and written by ``encode.py``, once.

Nothing in this package masks by token id, so a padding token that is also EOS harms nothing; a
tokenizer without one borrows an id (``SpecialIds.pad``): no token is ever added to a vocabulary.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from smoa_jax.checks import require
from smoa_jax.data.chat import turn_shape
from smoa_jax.data.gguf_tokenizer import tokenizer_from_gguf

#: Key in the tokenizer's own (saved) settings for stop ids that it has no place for.
STOP_IDS_KEY = "stop_token_ids"
#: Where a padding token may be borrowed from, in this order, before unk and EOS.
_RESERVED_PAD_TOKENS = (
    "<pad>",
    "<|pad|>",
    "[PAD]",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_0|>",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpecialIds:
    """The token ids that encoding and generation need.

    Attributes:
        bos: Id that every text begins with; -1 if this tokenizer begins texts with none.
        eos: Ids at which generation stops. The first is the one that ends a trained response.
        pad: Id that fills up rows. It carries no meaning and may equal an id of ``eos``.
    """

    bos: int
    eos: tuple[int, ...]
    pad: int


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """Loads the tokenizer of a Hugging Face directory or of a ``.gguf`` file.

    A tokenizer from a GGUF file can be written as a Hugging Face directory by its
    ``save_pretrained``.

    Raises:
        ValueError: Nothing at ``path`` holds a tokenizer, or what is there cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        _check_directory(path)
        read = _from_directory
    elif path.is_file() and path.suffix == ".gguf":
        read = tokenizer_from_gguf
    else:
        raise ValueError(
            f"got tokenizer path {path}; expected a directory with tokenizer.json or a .gguf file"
        )
    try:
        tokenizer, stops = read(path)
    except Exception as error:  # of many kinds; tokenizers raises bare Exception for a broken file
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ValueError(
            f"cannot read a tokenizer from {path} ({reason}); expected whole files with a "
            "vocabulary; download it again"
        ) from error
    known = tokenizer.init_kwargs.get(STOP_IDS_KEY, ())
    if stops:
        tokenizer.init_kwargs[STOP_IDS_KEY] = [*dict.fromkeys([*known, *stops])]
    return tokenizer


def special_ids(tokenizer: PreTrainedTokenizerFast) -> SpecialIds:
    """The ids for beginning, ending and padding texts of ``tokenizer``.

    Raises:
        ValueError: Neither the tokenizer nor what lies beside it names an end of texts.
    """
    own = _token_id(tokenizer, "eos")
    ends = [] if own is None else [own]
    ends += tokenizer.init_kwargs.get(STOP_IDS_KEY, ())
    turn_end = _turn_end(tokenizer)
    if turn_end is not None:
        ends.append(turn_end)
    require(
        bool(ends),
        "a tokenizer without an EOS token",
        "one, since responses end with it",
        'set "eos_token" in tokenizer_config.json',
    )
    eos = tuple(dict.fromkeys(ends))
    return SpecialIds(bos=_written_bos(tokenizer), eos=eos, pad=_pad_id(tokenizer, eos))


def _check_directory(path: Path) -> None:
    if (path / "tokenizer.json").is_file():
        return
    require(
        not (path / "tokenizer.model").is_file(),
        f"{path} with tokenizer.model alone",
        "tokenizer.json",
        "make it once, where sentencepiece and tiktoken are installed, with transformers' "
        "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)",
    )
    raise ValueError(
        f"got {path} without tokenizer.json; expected a fast tokenizer's file; "
        "save it with transformers' tokenizer.save_pretrained"
    )


def _from_directory(path: Path) -> tuple[PreTrainedTokenizerFast, list[int]]:
    """The tokenizer, and the stop ids that the files beside it declare."""
    # By class and not by AutoTokenizer: that one imports torch where torch is installed.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(path), local_files_only=True)
    # As in transformers, the model's own config speaks only where the generation config does not.
    for name in ("generation_config.json", "config.json"):
        file = path / name
        settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        stops = settings.get("eos_token_id")
        if stops is not None:
            return tokenizer, stops if isinstance(stops, list) else [stops]
    return tokenizer, []


def _turn_end(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """The id that the chat template ends an assistant's turn with, if there is one."""
    if not tokenizer.chat_template:
        return None
    try:
        token = turn_shape(tokenizer).token
    except ValueError:  # a template for other exchanges; who asks for it is told by make_template
        return None
    return _id_of(tokenizer, token) if token else None


def _written_bos(tokenizer: PreTrainedTokenizerFast) -> int:
    """The id this tokenizer itself puts before a text, or -1."""
    with_special = tokenizer("a", add_special_tokens=True).input_ids
    bos = _token_id(tokenizer, "bos")
    return bos if bos is not None and with_special[:1] == [bos] else -1


def _pad_id(tokenizer: PreTrainedTokenizerFast, eos: tuple[int, ...]) -> int:
    """An id for filling up rows that the model surely has an embedding for.

    The tokenizer's own, unless it lies beyond both the vocabulary and the ends of texts: such a one
    was added later, and the model may never have been resized for it.
    """
    known = 1 + max(*eos, tokenizer.backend_tokenizer.get_vocab_size(with_added_tokens=False) - 1)
    candidates = [_token_id(tokenizer, "pad")]
    candidates += [_id_of(tokenizer, token) for token in _RESERVED_PAD_TOKENS]
    candidates += [_token_id(tokenizer, "unk"), eos[0]]
    return next(token for token in candidates if token is not None and token < known)


def _token_id(tokenizer: PreTrainedTokenizerFast, kind: str) -> int | None:
    """The id of the tokenizer's ``bos``, ``eos``, ``unk`` or ``pad`` token, if it names one."""
    token = getattr(tokenizer, f"{kind}_token")
    return None if token is None else _id_of(tokenizer, str(token))


def _id_of(tokenizer: PreTrainedTokenizerFast, token: str) -> int | None:
    return tokenizer.backend_tokenizer.token_to_id(token)
