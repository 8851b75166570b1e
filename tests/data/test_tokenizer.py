"""Tokenizers from GGUF files and directories."""

from __future__ import annotations

import json

import gguf
import pytest

from smoa_jax.data.tokenizer import SpecialIds, load_tokenizer, special_ids


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


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


def write_gguf(path, tokens, *, model, pre="", merges=(), **ids):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    if pre:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(index) for index in range(len(tokens))])
    control = [3 if token.startswith("<") else 1 for token in tokens]
    writer.add_token_types(control)
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


def test_chat_template_beside_the_tokenizer_is_read(make_tokenizer, chatml, tmp_path):
    make_tokenizer("a").save_pretrained(tmp_path)
    assert not load_tokenizer(tmp_path).chat_template
    (tmp_path / "chat_template.jinja").write_text(chatml)
    assert load_tokenizer(tmp_path).chat_template == chatml


def test_stop_ids_come_from_generation_config_and_chat_template(make_tokenizer, chatml, tmp_path):
    tokenizer = make_tokenizer(
        "a", extra_special=("<|im_start|>", "<|im_end|>"), chat_template=chatml
    )
    turn_end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert special_ids(tokenizer).eos == (tokenizer.eos_token_id, turn_end)
    tokenizer.save_pretrained(tmp_path)
    stops = {"eos_token_id": [tokenizer.eos_token_id, 1]}
    (tmp_path / "generation_config.json").write_text(json.dumps(stops))
    assert special_ids(load_tokenizer(tmp_path)).eos == (tokenizer.eos_token_id, 1, turn_end)


def test_declared_stop_ids_survive_saving(make_tokenizer, tmp_path):
    make_tokenizer("a b").save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    load_tokenizer(tmp_path).save_pretrained(tmp_path / "again")
    assert special_ids(load_tokenizer(tmp_path / "again")).eos == (0, 2)


@pytest.mark.parametrize(
    ("special", "words", "pad"),
    [
        ({"eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "P"}, "a", "P"),
        ({"eos_token": "<eos>", "unk_token": "<unk>"}, "a <|reserved_special_token_0|>", None),
        ({"eos_token": "<eos>", "unk_token": "<unk>"}, "a", "<unk>"),
        ({"eos_token": "<eos>"}, "a", "<eos>"),
    ],
)
def test_padding_is_borrowed_where_none_is_named(make_tokenizer, special, words, pad):
    tokenizer = make_tokenizer(words, special=special)
    before = tokenizer.pad_token
    wanted = pad or "<|reserved_special_token_0|>"
    assert special_ids(tokenizer).pad == tokenizer.convert_tokens_to_ids(wanted)
    assert tokenizer.pad_token == before


@pytest.mark.parametrize("adds_bos", [False, True])
def test_bos_is_written_only_where_the_tokenizer_writes_it(make_tokenizer, adds_bos):
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    tokenizer = make_tokenizer("a", special=special, adds_bos=adds_bos)
    assert special_ids(tokenizer).bos == (tokenizer.bos_token_id if adds_bos else -1)


def test_a_tokenizer_without_eos_is_refused(make_tokenizer):
    tokenizer = make_tokenizer("a", special={"unk_token": "<unk>"})
    with pytest.raises(ValueError, match="without an EOS token"):
        special_ids(tokenizer)


def test_unreadable_tokenizers_are_refused_in_one_line(make_tokenizer, smollm2_path, tmp_path):
    with pytest.raises(ValueError, match=r"got tokenizer path .*nowhere; expected a directory"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"without tokenizer\.json"):
        load_tokenizer(tmp_path)
    make_tokenizer("a").save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(file.read_text()[:100])
    with pytest.raises(ValueError, match="cannot read a tokenizer from") as directory:
        load_tokenizer(tmp_path)
    assert "\n" not in str(directory.value)
    cut = tmp_path / "cut.gguf"
    with smollm2_path.open("rb") as whole:
        cut.write_bytes(whole.read(50_000))
    (tmp_path / "other.gguf").write_bytes(b"not a model at all")
    for broken in (cut, tmp_path / "other.gguf"):
        with pytest.raises(ValueError, match="cannot read a tokenizer from") as gguf:
            load_tokenizer(broken)
        assert "\n" not in str(gguf.value)
