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

import gguf
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
_GGUF_SPECIAL_IDS = {
    "bos": "ggml.bos_token_id",
    "eos": "ggml.eos_token_id",
    "unk": "ggml.unknown_token_id",
    "pad": "ggml.padding_token_id",
}
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
        tokenizer, stops = _from_directory(path)
    elif path.is_file() and path.suffix == ".gguf":
        tokenizer, stops = _from_gguf(path)
    else:
        raise ValueError(
            f"got tokenizer path {path}; expected a directory with tokenizer.json or a .gguf file"
        )
    if stops is not None:
        stops = stops if isinstance(stops, list) else [stops]
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


def _from_directory(path: Path) -> tuple[PreTrainedTokenizerFast, Any]:
    """The tokenizer, and the stop ids that the generation config declares."""
    if not (path / "tokenizer.json").is_file():
        raise ValueError(
            f"got {path} without tokenizer.json; expected a fast tokenizer's file; "
            "save it with transformers' tokenizer.save_pretrained"
        )
    generation = path / "generation_config.json"
    try:
        # By class and not by AutoTokenizer: that one imports torch where torch is installed.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(path), local_files_only=True)
        settings = json.loads(generation.read_text()) if generation.is_file() else {}
        return tokenizer, settings.get("eos_token_id")
    except Exception as error:  # tokenizers raises bare Exception for a corrupted file
        raise ValueError(f"cannot read the tokenizer in {path}: {_one_line(error)}") from error


def _from_gguf(path: Path) -> tuple[PreTrainedTokenizerFast, Any]:
    """The tokenizer, and the stop id that the file declares beside EOS."""
    # transformers' own reader of the metadata imports torch; its converter does not.
    from transformers.integrations.gguf.gguf_tokenizer_mapping import (
        GGUF_TOKENIZER_MAPPING,
        convert_gguf_tokenizer,
    )

    try:
        metadata = _gguf_metadata(path)
        vocabulary, config = (
            {name: metadata[key] for key, name in names.items() if key in metadata}
            for names in (
                GGUF_TOKENIZER_MAPPING["tokenizer"],
                GGUF_TOKENIZER_MAPPING["tokenizer_config"],
            )
        )
        for kind, key in _GGUF_SPECIAL_IDS.items():
            token = metadata.get(key)
            config[f"{kind}_token"] = None if token is None else vocabulary["tokens"][token]
        backend, extra = convert_gguf_tokenizer(metadata["general.architecture"], vocabulary)
    except Exception as error:  # struct, Unicode, key and value errors, by where the file is broken
        raise ValueError(
            f"cannot read a tokenizer from {path} ({_one_line(error)}); expected a whole GGUF file "
            "with a vocabulary"
        ) from error
    if vocabulary.get("tokenizer_type") == "llama":
        config.setdefault("add_bos_token", True)  # SentencePiece models: the format's default
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
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **config, **extra)
    return tokenizer, metadata.get("ggml.eot_token_id")


def _gguf_metadata(path: Path) -> dict[str, Any]:
    """The file's architecture, and its ``tokenizer.`` entries without that prefix."""
    fields = gguf.GGUFReader(path).fields
    prefix = "tokenizer."
    wanted = {name: field for name, field in fields.items() if name.startswith(prefix)}
    metadata = {name.removeprefix(prefix): field.contents() for name, field in wanted.items()}
    return {"general.architecture": fields["general.architecture"].contents(), **metadata}


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
