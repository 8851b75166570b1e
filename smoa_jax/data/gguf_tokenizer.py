"""Tokenizers from GGUF files, equal token for token to those their makers publish.

transformers has a converter that needs no torch, and this module feeds it and mends what it gets
wrong. Each mend was found by comparing ids with the makers' own ``tokenizer.json``:

- byte-level BPE (Llama 3, SmolLM2): whole words of the vocabulary come before merges (Llama 3),
  every digit is split from what precedes it (SmolLM2);
- SentencePiece (Llama 2): a space is put before *every* stretch of text, also before one that
  begins with a space and after a special token;
- Gemma: of a run of spaces the longest token is taken first, and such a token is one even where its
  own spelling stands in a text.

The metadata is read here as well: ``gguf.GGUFReader`` keeps arrays for every string of the file,
which takes seconds for Gemma's 262 144 tokens, and transformers' reader imports torch.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, BinaryIO

from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from smoa_jax.checks import require

#: GGUF names of pre-tokenizers that split every digit from its neighbours before byte-level BPE.
#: transformers' converter knows no such split; without it, whitespace before a digit is cut
#: otherwise ("a  1" as two spaces in place of one double space).
_DIGIT_SPLITTING = frozenset({"smollm", "starcoder", "refact", "command-r"})
#: GGUF names of Llama 3's pre-tokenizer: whole words of the vocabulary are taken before merges, and
#: texts begin with BOS unless the file says otherwise. transformers' converter does neither.
_LLAMA3 = frozenset({"llama3", "llama-v3", "llama-bpe"})
_GEMMA = frozenset({"gemma", "gemma2", "gemma3"})
_SPECIAL_IDS = {
    "bos": "tokenizer.ggml.bos_token_id",
    "eos": "tokenizer.ggml.eos_token_id",
    "unk": "tokenizer.ggml.unknown_token_id",
    "pad": "tokenizer.ggml.padding_token_id",
}
#: Ids at which generation stops, beside EOS: ends of a turn and of a message.
_STOP_IDS = ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
#: How SentencePiece writes a space.
_SPACE = "\u2581"
_SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q",
    12: "<d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9


def tokenizer_from_gguf(path: Path) -> tuple[PreTrainedTokenizerFast, list[int]]:
    """The tokenizer of a GGUF file, and the stop ids that the file declares beside EOS.

    Raises:
        Exception: The file is not a whole GGUF file with a vocabulary; of which kind (struct,
            Unicode, key, value and end-of-file errors) depends on where it is broken.
    """
    # Imported here: what is imported on the way takes half a second.
    from transformers.integrations.gguf.gguf_tokenizer_mapping import (
        GGUF_TOKENIZER_MAPPING,
        convert_gguf_tokenizer,
    )

    metadata = read_metadata(path)
    architecture = metadata["general.architecture"]
    vocabulary, config = (
        {
            name: metadata[f"tokenizer.{key}"]
            for key, name in GGUF_TOKENIZER_MAPPING[part].items()
            if f"tokenizer.{key}" in metadata
        }
        for part in ("tokenizer", "tokenizer_config")
    )
    for kind, key in _SPECIAL_IDS.items():
        token = metadata.get(key)
        config[f"{kind}_token"] = None if token is None else vocabulary["tokens"][token]
    if architecture in _GEMMA:
        _respell_gemma(vocabulary)
    backend, extra = convert_gguf_tokenizer(architecture, vocabulary)
    split = vocabulary.get("pre_tokenizer_type")
    sentencepiece = vocabulary.get("tokenizer_type") == "llama"
    if sentencepiece and architecture not in _GEMMA:
        _write_spaces(backend, prefix=vocabulary.get("add_prefix_space", True))
    if split in _LLAMA3:
        backend.model.ignore_merges = True  # type: ignore[attr-defined]
    if sentencepiece or split in _LLAMA3:
        config.setdefault("add_bos_token", True)  # the format's default for these
    if split in _DIGIT_SPLITTING:
        backend.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **config, **extra)
    return tokenizer, [metadata[key] for key in _STOP_IDS if key in metadata]


def _write_spaces(backend: Tokenizer, *, prefix: bool) -> None:
    """SentencePiece's spaces: one before each stretch of text, unless ``prefix`` says none."""
    space = normalizers.Replace(" ", _SPACE)
    steps = [normalizers.Prepend(_SPACE), space] if prefix else [space]
    backend.normalizer = normalizers.Sequence(steps)  # type: ignore[assignment]
    backend.pre_tokenizer = None  # type: ignore[assignment]
    text = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    strip = [decoders.Strip(content=" ", left=1)] if prefix else []
    backend.decoder = decoders.Sequence([*text, *strip])  # type: ignore[assignment]


def _respell_gemma(vocabulary: dict[str, Any]) -> None:
    """Writes runs of spaces as SentencePiece does, and the merges of a file that has none.

    The converter respells the runs too late to see that the file takes them out of a text before
    all merges. Gemma's merges follow the order of its vocabulary, except that of a run of equal
    whitespace the longest token comes first.
    """
    from transformers.tokenization_utils_base import generate_merges

    tokens = [
        _SPACE * len(token) if token and not token.strip(" ") else token
        for token in vocabulary["tokens"]
    ]
    vocabulary["tokens"] = tokens
    if "merges" in vocabulary:
        return
    ids = {token: index for index, token in enumerate(tokens)}
    merges = generate_merges(ids, {token: -index for token, index in ids.items()})
    runs = [merge for merge in merges if _is_run("".join(merge))]
    runs.sort(key=lambda merge: (-len(merge[0]), -len(merge[1])))
    words = [merge for merge in merges if not _is_run("".join(merge))]
    vocabulary["merges"] = [" ".join(merge) for merge in [*runs, *words]]


def _is_run(token: str) -> bool:
    return token[0] in f"{_SPACE}\n\t" and token == token[0] * len(token)


def read_metadata(path: Path) -> dict[str, Any]:
    """The key-value pairs at the beginning of a GGUF file.

    Raises:
        ValueError: The file is no little-endian GGUF file of version 2 or 3.
        EOFError: The file ends too early.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError("got a file of another kind")
        version = _scalar(file, "<I")
        require(version in (2, 3), f"GGUF version {version}", "2 or 3, little-endian")
        _scalar(file, "<Q")  # number of tensors
        pairs = _scalar(file, "<Q")
        return {_string(file, size): _value(file, _scalar(file, "<I"), size) for _ in range(pairs)}


def _value(file: BinaryIO, kind: int, size: int) -> Any:
    if kind == _STRING:
        return _string(file, size)
    if kind != _ARRAY:
        return _scalar(file, _SCALARS[kind])
    of, count = _scalar(file, "<I"), _scalar(file, "<Q")
    if of in _SCALARS:
        code = _SCALARS[of][1]
        data = _bytes(file, count * struct.calcsize(f"<{code}"), size)
        return list(struct.unpack(f"<{count}{code}", data))
    return [_value(file, of, size) for _ in range(count)]


def _string(file: BinaryIO, size: int) -> str:
    return _bytes(file, _scalar(file, "<Q"), size).decode("utf-8")


def _scalar(file: BinaryIO, code: str) -> Any:
    width = struct.calcsize(code)
    return struct.unpack(code, _bytes(file, width, width))[0]


def _bytes(file: BinaryIO, count: int, size: int) -> bytes:
    """``count`` bytes; a count above ``size``, the whole file's, is not even tried."""
    data = file.read(count) if count <= size else b""
    if len(data) != count:
        raise EOFError("the file ends too early")
    return data
