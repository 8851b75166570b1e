"""Tokenizers of directories, and the ids that begin, end and fill up texts."""

from __future__ import annotations

import json

import pytest

from smoa_jax.data.chat import turn_shape
from smoa_jax.data.pieces import encode_pieces
from smoa_jax.data.tokenizer import load_tokenizer, special_ids
from tests.data import families


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


def test_stop_ids_come_from_the_models_config_where_generation_declares_none(tmp_path):
    families.llama3(chat_template=None).save_pretrained(tmp_path)
    own, eot, eom = (
        load_tokenizer(tmp_path).convert_tokens_to_ids(token)
        for token in ("<|end_of_text|>", "<|eot_id|>", "<|eom_id|>")
    )
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [own, eom, eot]}))
    assert special_ids(load_tokenizer(tmp_path)).eos == (own, eom, eot)
    (tmp_path / "generation_config.json").write_text("{}")
    assert special_ids(load_tokenizer(tmp_path)).eos == (own, eom, eot)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eot}))
    assert special_ids(load_tokenizer(tmp_path)).eos == (own, eot)


def test_of_several_chat_templates_the_default_is_used(make_tokenizer, chatml, tmp_path):
    special = {"eos_token": "<|im_end|>", "unk_token": "<unk>"}
    make_tokenizer("a", special=special, chat_template=chatml).save_pretrained(tmp_path)
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    tokenizer = load_tokenizer(tmp_path)
    assert sorted(tokenizer.chat_template) == ["default", "tool_use"]
    assert turn_shape(tokenizer).token == "<|im_end|>"
    tokenizer.chat_template = {"tool_use": "{{ tools }}"}
    with pytest.raises(ValueError, match="no default specified"):
        turn_shape(tokenizer)


def test_a_chat_template_inside_the_tokenizers_config_is_read(make_tokenizer, chatml, tmp_path):
    make_tokenizer("a").save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": chatml}))
    assert load_tokenizer(tmp_path).chat_template == chatml


def test_truncation_and_padding_saved_in_a_tokenizer_cut_no_row(make_tokenizer, tmp_path):
    tokenizer = make_tokenizer("a b c d e f")
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=3)
    tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
    [[first, second]] = encode_pieces(load_tokenizer(tmp_path), [["a b c d", "e"]])
    assert (len(first), len(second)) == (7, 1)


def test_a_sentencepiece_model_alone_is_refused_with_the_way_out(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"pieces")
    with pytest.raises(ValueError, match=r"with tokenizer\.model alone; expected tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_declared_stop_ids_survive_saving(make_tokenizer, tmp_path):
    make_tokenizer("a b").save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    load_tokenizer(tmp_path).save_pretrained(tmp_path / "again")
    assert special_ids(load_tokenizer(tmp_path / "again")).eos == (0, 2)
    (tmp_path / "again" / "generation_config.json").write_text('{"eos_token_id": 3}')
    assert special_ids(load_tokenizer(tmp_path / "again")).eos == (0, 2, 3)


def test_a_declared_stop_serves_a_tokenizer_without_eos(make_tokenizer, tmp_path):
    make_tokenizer("a", special={"unk_token": "<unk>"}).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 0}')
    assert special_ids(load_tokenizer(tmp_path)).eos == (0,)


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


def test_padding_is_never_an_id_that_was_added_for_it(tmp_path):
    """Llama 2 with a [PAD] token of its own: the model may have no embedding for it."""
    families.llama2().save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pad_token": "[PAD]"}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.pad_token_id == len(tokenizer) - 1
    assert special_ids(tokenizer).pad == tokenizer.unk_token_id


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
