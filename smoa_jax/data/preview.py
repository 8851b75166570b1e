"""A training row as the model will see it, with the tokens that it learns marked."""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast

from smoa_jax.checks import require
from smoa_jax.data.encode import Examples

#: Around the text of tokens that are learned.
MARKS = ("\u27e6", "\u27e7")


def preview(examples: Examples, index: int, tokenizer: PreTrainedTokenizerFast) -> str:
    """One row: its counts, then its text with what is learned between \u27e6 and \u27e7.

    >>> print(preview(data.train.examples, 0, tokenizer))

    Special tokens are written out, so that a missing or doubled one can be seen.

    Raises:
        ValueError: for an index that no row has.
    """
    require(0 <= index < len(examples), f"row {index}", f"0 to {len(examples) - 1}")
    tokens, trained = examples[index]
    written, text = "", ""
    for end, is_trained in enumerate(trained, start=1):
        if end < len(tokens) and trained[end] == is_trained:
            continue
        # Decoded from the start each time: a piece alone may lose the space before it.
        whole = tokenizer.decode(tokens[:end].tolist(), clean_up_tokenization_spaces=False)
        piece = str(whole)[len(text) :]
        written += f"{MARKS[0]}{piece}{MARKS[1]}" if is_trained else piece
        text = str(whole)
    count = f"row {index}: {len(tokens)} tokens, {int(trained.sum())} learned"
    return f"{count} (between {MARKS[0]} and {MARKS[1]})\n{written}"
