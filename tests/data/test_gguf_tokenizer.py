"""Tokenizers from GGUF files give the ids of their makers' own files."""

from __future__ import annotations

import struct

import gguf
import pytest

from smoa_jax.data.gguf_tokenizer import read_metadata
from smoa_jax.data.tokenizer import SpecialIds, load_tokenizer, special_ids
from tests.data import families

USER_DEFINED, BYTE = 4, 6


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def tokens_of(tokenizer, text: str) -> list[str]:
    return tokenizer.convert_ids_to_tokens(ids(tokenizer, text))


def test_smollm2_from_gguf_has_its_known_ids(smollm2):
    assert len(smollm2) == 49152
    assert ids(smollm2, "The capital of France is") == [504, 3575, 282, 4649, 314]
    assert ids(smollm2, "<|im_start|>user\n<|im_end|>") == [1, 4093, 198, 2]
    assert special_ids(smollm2) == SpecialIds(bos=-1, eos=(2,), pad=2)


def test_smollm2_splits_every_digit_from_what_precedes_it(smollm2):
    def tokens(text: str) -> list[str]:
        return smollm2.convert_ids_to_tokens(ids(smollm2, text))

    assert tokens("1234.5") == ["1", "2", "3", "4", ".", "5"]
    assert tokens("a  12") == ["a", "ĠĠ", "1", "2"]
    assert tokens("x\n\n12") == ["x", "ĊĊ", "1", "2"]


@pytest.mark.parametrize("text", ["Hello, wörld!  12+3\n\n日本 🙂", " lead", "a\t<|im_end|>\n"])
def test_smollm2_decodes_what_it_encodes(smollm2, text):
    assert smollm2.decode(ids(smollm2, text)) == text


def test_a_gguf_tokenizer_saved_as_directory_opens_in_transformers(smollm2, tmp_path):
    from transformers import AutoTokenizer

    smollm2.save_pretrained(tmp_path)
    chat = [{"role": "user", "content": "2 + 2?"}]
    text = "Rows  12\n\n34 <|im_end|> end"
    for opened in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)):
        assert ids(opened, text) == ids(smollm2, text)
        assert opened.apply_chat_template(chat, tokenize=False) == smollm2.apply_chat_template(
            chat, tokenize=False
        )
        assert (opened.bos_token, opened.eos_token, opened.pad_token) == (
            "<|im_start|>",
            "<|im_end|>",
            "<|im_end|>",
        )
        assert special_ids(opened) == special_ids(smollm2)


def write_gguf(
    path, tokens, *, model, architecture="llama", pre="", merges=(), kinds=None, prefix=None, **ids
):
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_tokenizer_model(model)
    if pre:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(index) for index in range(len(tokens))])
    kinds = kinds or {}
    writer.add_token_types([kinds.get(t, 3 if t.startswith("<") else 1) for t in tokens])
    if prefix is not None:
        writer.add_add_space_prefix(prefix)
    if merges:
        writer.add_token_merges(list(merges))
    for name, token in ids.items():
        getattr(writer, f"add_{name}_token_id")(tokens.index(token))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return load_tokenizer(path)


def test_llama3_from_gguf_begins_with_bos_and_takes_whole_words_first(tmp_path):
    tokens = ["<|begin|>", "<|end|>", "<|eot|>", "a", "b", "c", "ab", "abc"]
    options = {"model": "gpt2", "merges": ["a b"], "bos": "<|begin|>", "eos": "<|end|>"}
    llama3 = write_gguf(tmp_path / "l3.gguf", tokens, pre="llama-bpe", eot="<|eot|>", **options)
    assert special_ids(llama3) == SpecialIds(bos=0, eos=(1, 2), pad=1)
    assert llama3.convert_ids_to_tokens(ids(llama3, "abc")) == ["abc"]
    other = write_gguf(tmp_path / "gpt2.gguf", tokens, pre="gpt-2", **options)
    assert special_ids(other) == SpecialIds(bos=-1, eos=(1,), pad=1)
    assert other.convert_ids_to_tokens(ids(other, "abc")) == ["ab", "c"]


def test_llama2_from_gguf_begins_with_bos(tmp_path):
    tokens = ["<unk>", "<s>", "</s>", "\u2581", "a", "b", "\u2581a", "\u2581ab"]
    options = {"bos": "<s>", "eos": "</s>", "unk": "<unk>"}
    tokenizer = write_gguf(tmp_path / "l2.gguf", tokens, model="llama", **options)
    assert special_ids(tokenizer) == SpecialIds(bos=1, eos=(2,), pad=0)
    assert tokenizer("ab").input_ids == [1, 7]


GEMMA_TOKENS = [
    *["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"],
    *["\n", "\n\n", *(" " * length for length in (2, 3, 4, 5))],
    *[f"<0x{byte:02X}>" for byte in range(256)],
    *["ab", "\u2581a", "\u2581ab", "\u2581", "a", "b", "c"],
]


def gemma_gguf(path, **options):
    kinds = dict.fromkeys(["\n", "\n\n", *(" " * n for n in (2, 3, 4, 5))], USER_DEFINED)
    kinds |= {f"<0x{byte:02X}>": BYTE for byte in range(256)}
    special = {"bos": "<bos>", "eos": "<eos>", "unk": "<unk>", "pad": "<pad>"}
    options = {"model": "llama", "architecture": "gemma3", "kinds": kinds} | special | options
    return write_gguf(path, GEMMA_TOKENS, prefix=False, **options)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("ab", ["ab"]),  # no space before a text
        (" ab", ["\u2581ab"]),
        ("c  ab", ["c", "\u2581\u2581", "ab"]),  # a run of spaces comes before words
        ("c" + " " * 9, ["c", "\u2581" * 5, "\u2581" * 4]),  # the longest run first
        ("\u2581\u2581  c", ["\u2581\u2581", "\u2581\u2581", "c"]),  # spelled out it is one too
        ("a\n\n\nb", ["a", "\n\n", "\n", "b"]),
        ("\t\u00e9", ["<0x09>", "<0xC3>", "<0xA9>"]),
        ("<start_of_turn>a<end_of_turn>\n", ["<start_of_turn>", "a", "<end_of_turn>", "\n"]),
    ],
)
def test_gemma_from_gguf_cuts_as_sentencepiece_does(tmp_path, text, tokens):
    gemma = gemma_gguf(tmp_path / "gemma.gguf")
    assert tokens_of(gemma, text) == tokens
    assert gemma.decode(ids(gemma, text)) == text.replace("\u2581", " ")


def test_gemma_from_gguf_has_its_makers_special_tokens(tmp_path):
    base = gemma_gguf(tmp_path / "base.gguf")
    assert special_ids(base) == SpecialIds(bos=2, eos=(1,), pad=0)
    chat = ids(base, "<start_of_turn>a<end_of_turn>")
    assert chat[::2] == [4, 5]
    assert base.decode(chat, skip_special_tokens=True) == "a"
    assert base("a").input_ids == [2, *ids(base, "a")]
    declared = gemma_gguf(tmp_path / "declared.gguf", eot="<end_of_turn>")
    assert special_ids(declared).eos == (1, 5)
    base.chat_template = families.GEMMA3
    assert special_ids(base).eos == (1, 5)


def test_llama2_from_gguf_puts_a_space_before_every_stretch_of_text(tmp_path):
    tokens = ["<unk>", "<s>", "</s>", "\u2581a", "\u2581", "a", "\u2581\u2581"]
    options = {"model": "llama", "bos": "<s>", "eos": "</s>", "unk": "<unk>"}
    llama2 = write_gguf(tmp_path / "l2.gguf", tokens, **options)
    assert tokens_of(llama2, "a") == ["\u2581a"]
    assert tokens_of(llama2, " a") == ["\u2581", "\u2581a"]
    assert tokens_of(llama2, "a</s>a") == ["\u2581a", "</s>", "\u2581a"]
    assert llama2.decode(ids(llama2, " a")) == " a"
    without = write_gguf(tmp_path / "none.gguf", tokens, prefix=False, **options)
    assert tokens_of(without, "a a") == ["a", "\u2581a"]
    assert without.decode(ids(without, " a")) == " a"


#: Texts and the ids that the tokenizer.json of google/gemma-3 gives them.
GEMMA3_IDS = {
    "The capital of France is": [818, 5279, 529, 7001, 563],
    "Hello, w\xf6rld!  12+345\n\n\u65e5\u672c \U0001f642": [
        9259,
        236764,
        515,
        4010,
        671,
        236888,
        138,
        236770,
        236778,
        236862,
        236800,
        236812,
        236810,
        108,
        10956,
        57235,
    ],
    " lead": [2080],
    "a\t\tb\r\n": [236746, 255969, 236763, 251, 107],
    "x                                 y": [236781, 167, 138, 236762],
    "def f(x):\n    return x ** 2\n": [
        2063,
        517,
        236769,
        236781,
        1473,
        107,
        140,
        2060,
        1123,
        5213,
        236743,
        236778,
        107,
    ],
    "<start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n": [
        105,
        2364,
        107,
        2202,
        106,
        107,
        105,
        4368,
        107,
    ],
    "<b>bold</b> \x01": [200, 15640, 209, 236743, 249732],
}


@pytest.mark.slow
@pytest.mark.parametrize("text", GEMMA3_IDS)
def test_gemma3_from_gguf_has_its_known_ids(gemma3, text):
    assert ids(gemma3, text) == GEMMA3_IDS[text]


@pytest.mark.slow
def test_gemma3_from_gguf_has_its_known_special_ids(gemma3):
    assert len(gemma3) == 262144
    assert special_ids(gemma3) == SpecialIds(bos=2, eos=(1,), pad=0)


def test_metadata_is_what_the_gguf_package_reads(smollm2_path):
    fields = gguf.GGUFReader(smollm2_path).fields
    expected = {
        key: field.contents() for key, field in fields.items() if not key.startswith("GGUF.")
    }
    assert read_metadata(smollm2_path) == expected


@pytest.mark.parametrize(
    ("beginning", "problem"),
    [
        (b"GGUF" + struct.pack("<I", 1), r"ValueError: got GGUF version 1; expected 2 or 3"),
        (b"GGUF" + struct.pack(">I", 3), "expected 2 or 3, little-endian"),
        # One pair, whose name claims to be longer than the file, or than any memory.
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 62), "EOFError: the file ends too early"),
    ],
)
def test_broken_beginnings_are_told_apart(tmp_path, beginning, problem):
    path = tmp_path / "broken.gguf"
    path.write_bytes(beginning)
    with pytest.raises(ValueError, match=problem):
        load_tokenizer(path)
