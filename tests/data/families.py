"""Small tokenizers with the special tokens and chat templates of their makers' families."""

from __future__ import annotations

import re

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

#: Llama 3.1 and later: a system turn with two dates, always.
LLAMA3 = (
    "{{- bos_token }}"
    "{%- if messages[0]['role'] == 'system' %}"
    "{%- set system = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}"
    "{%- else %}{%- set system = '' %}{%- endif %}"
    "{%- if not date_string is defined %}{%- set date_string = '1 Jan 2000' %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}"
    "{{- 'Today Date: ' + date_string + '\\n\\n' }}{{- system }}{{- '<|eot_id|>' }}"
    "{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{{- message['content'] | trim }}{{- '<|eot_id|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)
#: The first release of Llama 3 wrote the next header whether it was asked for or not.
LLAMA3_FIRST = LLAMA3.replace("{%- if add_generation_prompt %}", "{%- if true %}")
_GEMMA_TURNS = (
    "{%- for message in loop_messages %}"
    "{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{- raise_exception('Conversation roles must alternate user/assistant') }}{%- endif %}"
    "{%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{- '<start_of_turn>' + role + '\\n' + (prefix if loop.first else '') }}"
    "{{- message['content'] | trim }}{{- '<end_of_turn>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}"
)
#: Gemma 3: no system role; its text opens the first user turn.
GEMMA3 = (
    "{{- bos_token }}"
    "{%- if messages[0]['role'] == 'system' %}"
    "{%- set prefix = messages[0]['content'] + '\\n\\n' %}{%- set loop_messages = messages[1:] %}"
    "{%- else %}{%- set prefix = '' %}{%- set loop_messages = messages %}{%- endif %}"
) + _GEMMA_TURNS
#: Gemma 1 and 2 refuse a system message.
GEMMA2 = (
    "{{- bos_token }}{%- if messages[0]['role'] == 'system' %}"
    "{{- raise_exception('System role not supported') }}{%- endif %}"
    "{%- set prefix = '' %}{%- set loop_messages = messages %}"
) + _GEMMA_TURNS
#: Gemma 4: turns between two tokens of their own, a system turn among them.
GEMMA4 = (
    "{{- bos_token }}{%- for message in messages %}"
    "{%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{- '<|turn>' + role + '\\n' + message['content'] | trim + '<turn|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|turn>model\\n' }}{%- endif %}"
)
#: Its larger models are shown an empty thought where a reply is asked for, and nowhere else.
GEMMA4_LARGE = GEMMA4.replace("<|turn>model\\n'", "<|turn>model\\n<|channel>thought\\n<channel|>'")
#: Llama 2: one BOS and one EOS for every exchange, the system text inside the first instruction.
LLAMA2 = (
    "{%- if messages[0]['role'] == 'system' %}"
    "{%- set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}"
    "{%- set loop_messages = messages[1:] %}"
    "{%- else %}{%- set system = '' %}{%- set loop_messages = messages %}{%- endif %}"
    "{%- for message in loop_messages %}"
    "{%- if message['role'] == 'user' %}"
    "{{- bos_token + '[INST] ' + (system if loop.first else '') }}"
    "{{- message['content'].strip() + ' [/INST]' }}"
    "{%- else %}{{- ' ' + message['content'].strip() + ' ' + eos_token }}{%- endif %}"
    "{%- endfor %}"
)
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
#: Qwen 2.5: ChatML that says who it is where no system message does.
QWEN2 = (
    "{%- if messages[0]['role'] != 'system' %}"
    "{{- '<|im_start|>system\\nYou are Qwen<|im_end|>\\n' }}{%- endif %}"
) + CHATML
#: Qwen 3: the last reply is written behind its thoughts, or behind none; earlier ones without.
QWEN3 = (
    "{%- for message in messages %}{{- '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['role'] == 'assistant' and loop.last %}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{{- message['content'] + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
#: Mistral 7B v0.3: one BOS, an EOS after every reply, the system text in the last instruction.
MISTRAL = (
    "{{- bos_token }}"
    "{%- if messages[0]['role'] == 'system' %}"
    "{%- set system = messages[0]['content'] + '\\n\\n' %}{%- set turns = messages[1:] %}"
    "{%- else %}{%- set system = '' %}{%- set turns = messages %}{%- endif %}"
    "{%- for message in turns %}{%- if message['role'] == 'user' %}"
    "{{- '[INST] ' + (system if loop.last else '') + message['content'] + '[/INST]' }}"
    "{%- else %}{{- ' ' + message['content'] + eos_token }}{%- endif %}{%- endfor %}"
)


def word_tokenizer(
    *texts: str,
    special: dict[str, str] | None = None,
    extra_special: tuple[str, ...] = (),
    adds_bos: bool = False,
    chat_template: str | None = None,
) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are the words, spaces and newlines of the texts it is made from."""
    special = {"eos_token": "<eos>", "unk_token": "<unk>"} if special is None else special
    tokens = [*dict.fromkeys([*special.values(), *extra_special])]
    words = dict.fromkeys(word for text in texts for word in re.findall(r"\S+|\s", text))
    vocabulary = {token: index for index, token in enumerate([*tokens, *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=special.get("unk_token", "")))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\S+|\s"), "isolated")
    backend.add_special_tokens(tokens)
    if adds_bos:
        _write_bos(backend, special["bos_token"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=chat_template, **special)


def llama3(*texts: str, chat_template: str | None = LLAMA3) -> PreTrainedTokenizerFast:
    """As Llama 3's instruct models: BOS added, EOS is the end of a turn, no padding token."""
    return word_tokenizer(
        "system user assistant Today Date: 26 Jul 2024 \n",
        *texts,
        special={
            "bos_token": "<|begin_of_text|>",
            "eos_token": "<|eot_id|>" if chat_template else "<|end_of_text|>",
            "unk_token": "?",
        },
        extra_special=(
            "<|end_of_text|>",
            "<|eot_id|>",
            "<|eom_id|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|finetune_right_pad_id|>",
        ),
        adds_bos=True,
        chat_template=chat_template,
    )


def gemma(*texts: str, chat_template: str | None = GEMMA3) -> PreTrainedTokenizerFast:
    """As Gemma's models: BOS added, EOS is ``<eos>``, turns end with a token of their own."""
    return word_tokenizer(
        "user model system thought \n",
        *texts,
        special={
            "pad_token": "<pad>",
            "eos_token": "<eos>",
            "bos_token": "<bos>",
            "unk_token": "<unk>",
        },
        extra_special=(
            *("<start_of_turn>", "<end_of_turn>"),
            *("<|turn>", "<turn|>", "<|channel>", "<channel|>"),
        ),
        adds_bos=True,
        chat_template=chat_template,
    )


def llama2(chat_template: str | None = LLAMA2) -> PreTrainedTokenizerFast:
    """As Llama 2's: SentencePiece, a space before every stretch of text, no padding token."""
    merges = [("\u2581", letter) for letter in "abcde[S"]
    merges += [("I", "N"), ("IN", "S"), ("INS", "T"), ("/", "INST")]
    pieces = ["<unk>", "<s>", "</s>", "<0x0A>", "\u2581", *"abcde[]/<>INSTY"]
    tokens = dict.fromkeys([*pieces, *(left + right for left, right in merges)])
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    backend.add_special_tokens(
        [AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")]
    )
    _write_bos(backend, "<s>")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=chat_template,
    )


def mistral(*texts: str) -> PreTrainedTokenizerFast:
    """As Mistral's v3: instructions stand between tokens of their own; no padding token."""
    return word_tokenizer(
        " \n",
        *texts,
        special={"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
        extra_special=("[INST]", "[/INST]"),
        adds_bos=True,
        chat_template=MISTRAL,
    )


def qwen(*texts: str, chat_template: str = QWEN2) -> PreTrainedTokenizerFast:
    """As Qwen's instruct models: turns end with EOS, padding is another token; no BOS at all."""
    return word_tokenizer(
        "system user assistant You are Qwen \n",
        *texts,
        special={
            "eos_token": "<|im_end|>",
            "unk_token": "<unk>",
            "pad_token": "<|endoftext|>",
        },
        extra_special=("<|im_start|>", "<think>", "</think>"),
        chat_template=chat_template,
    )


def chatml(*texts: str) -> PreTrainedTokenizerFast:
    """As SmolLM2's: one token is end of turn, EOS and padding; no BOS is added."""
    return word_tokenizer(
        "system user assistant \n",
        *texts,
        special={
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
            "unk_token": "<|endoftext|>",
            "pad_token": "<|im_end|>",
        },
        chat_template=CHATML,
    )


def _write_bos(backend: Tokenizer, bos: str) -> None:
    backend.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
    )
