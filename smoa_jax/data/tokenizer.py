"""Tokenizers from a Hugging Face directory or from a GGUF file, without torch and without network.

Two things go wrong quietly with tokenizers, and are settled here once:

- *Which ids end a text.* A model may stop at several tokens (``<|end_of_text|>`` and
  ``<|eot_id|>``): they are gathered from the tokenizer, from ``generation_config.json``, from the
  GGUF's metadata and from what the chat template writes after an assistant's turn.
- *Whether texts begin with BOS.* It is tried on the tokenizer itself instead of believed from a
  flag, and written by ``encode.py``, once.

Nothing in this package masks by token id, so a padding token that is also EOS harms nothing; a
tokenizer without one borrows an id (``SpecialIds.pad``) and is left as it is.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerFast

#: GGUF names of pre-tokenizers that split every digit from its neighbours before byte-level BPE.
#: transformers' converter knows no such split; without it, whitespace before a digit is cut
#: otherwise ("a  1" as two spaces in place of one double space).
_DIGIT_SPLITTING = frozenset({"smollm", "starcoder", "refact", "command-r"})
#: GGUF names of Llama 3's pre-tokenizer: whole words of the vocabulary are taken before merges, and
#: texts begin with BOS unless the file says otherwise. transformers' converter does neither.
_LLAMA3 = frozenset({"llama3", "llama-v3", "llama-bpe"})
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
        tokenizer = _from_directory(path)
    elif path.is_file() and path.suffix == ".gguf":
        tokenizer = _from_gguf(path)
    else:
        raise ValueError(
            f"got tokenizer path {path}; expected a directory with tokenizer.json or a .gguf file"
        )
    if stops := _declared_stop_ids(path):
        tokenizer.init_kwargs[STOP_IDS_KEY] = stops
    return tokenizer


def special_ids(tokenizer: PreTrainedTokenizerFast) -> SpecialIds:
    """The ids for beginning, ending and padding texts of ``tokenizer``.

    Raises:
        ValueError: The tokenizer names no end-of-sequence token.
    """
    end = _token_id(tokenizer, "eos")
    if end is None:
        raise ValueError(
            "got a tokenizer without an EOS token; expected one, since responses end with it; "
            'set "eos_token" in tokenizer_config.json'
        )
    stops = [end, *tokenizer.init_kwargs.get(STOP_IDS_KEY, ())]
    turn_end = chat_turn_end(tokenizer)
    if turn_end:
        stops.append(tokenizer.get_vocab()[turn_end])
    return SpecialIds(
        bos=_written_bos(tokenizer),
        eos=tuple(dict.fromkeys(stops)),
        pad=_pad_id(tokenizer, otherwise=end),
    )


def chat_turn_end(tokenizer: PreTrainedTokenizerFast) -> str:
    """The special token that the chat template writes after an assistant's turn, or ``""``."""
    if not tokenizer.chat_template:
        return ""
    candidates = special_texts(tokenizer)
    probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        text = tokenizer.apply_chat_template(probe, tokenize=False)
    except TemplateError:  # a template for other conversations; rows will tell what it accepts
        return ""
    endings = [token for token in candidates if str(text).rstrip().endswith(token)]
    return max(endings, key=len, default="")


def special_texts(tokenizer: PreTrainedTokenizerFast) -> tuple[str, ...]:
    """The texts of the special and other added tokens of ``tokenizer``."""
    added = (str(token) for token in tokenizer.added_tokens_decoder.values())
    texts = {*tokenizer.all_special_tokens, *added}
    return tuple(text for text in texts if text.strip())


def _from_directory(path: Path) -> PreTrainedTokenizerFast:
    if not (path / "tokenizer.json").is_file():
        raise ValueError(
            f"got {path} without tokenizer.json; expected a fast tokenizer's file; "
            "save it with transformers' tokenizer.save_pretrained"
        )
    try:
        # By class and not by AutoTokenizer: that one imports torch where torch is installed.
        return PreTrainedTokenizerFast.from_pretrained(str(path), local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exception for a corrupted file
        raise ValueError(f"cannot read the tokenizer in {path}: {_one_line(error)}") from error


def _from_gguf(path: Path) -> PreTrainedTokenizerFast:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import (
        convert_gguf_tokenizer,
        get_gguf_tokenizer,
    )

    try:
        architecture, vocabulary, config = get_gguf_tokenizer(str(path))
        backend, extra = convert_gguf_tokenizer(architecture, vocabulary)
    except Exception as error:  # struct, Unicode, key and value errors, by where the file is broken
        raise ValueError(
            f"cannot read a tokenizer from {path} ({_one_line(error)}); expected a whole GGUF file "
            "with a vocabulary"
        ) from error
    split = vocabulary.get("pre_tokenizer_type")
    if split in _LLAMA3:
        backend.model.ignore_merges = True  # type: ignore[attr-defined]
        config.setdefault("add_bos_token", True)
    if split in _DIGIT_SPLITTING:
        backend.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, **config, **extra)


def _declared_stop_ids(path: Path) -> list[int]:
    """Stop ids that stand outside the tokenizer: generation config or GGUF metadata."""
    if path.is_dir():
        file = path / "generation_config.json"
        stops = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
    else:
        stops = _gguf_value(path, "tokenizer.ggml.eot_token_id")
    if stops is None:
        return []
    return list(stops) if isinstance(stops, list) else [stops]


def _gguf_value(path: Path, key: str) -> Any:
    from transformers.integrations.gguf.reader import read_gguf_metadata

    metadata, _ = read_gguf_metadata(str(path), ())
    return metadata.get(key)


def _written_bos(tokenizer: PreTrainedTokenizerFast) -> int:
    """The id this tokenizer itself puts before a text, or -1."""
    with_special = tokenizer("a", add_special_tokens=True).input_ids
    bos = _token_id(tokenizer, "bos")
    return bos if bos is not None and with_special[:1] == [bos] else -1


def _pad_id(tokenizer: PreTrainedTokenizerFast, *, otherwise: int) -> int:
    own = _token_id(tokenizer, "pad")
    if own is not None:
        return own
    vocabulary = tokenizer.get_vocab()
    for token in _RESERVED_PAD_TOKENS:
        if token in vocabulary:
            return vocabulary[token]
    unknown = _token_id(tokenizer, "unk")
    return otherwise if unknown is None else unknown


def _token_id(tokenizer: PreTrainedTokenizerFast, kind: str) -> int | None:
    """The id of the tokenizer's ``bos``, ``eos``, ``unk`` or ``pad`` token, if it names one."""
    token = getattr(tokenizer, f"{kind}_token")
    return None if token is None else tokenizer.get_vocab().get(str(token))


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
