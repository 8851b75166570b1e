"""The language model inside a multimodal checkpoint: read alone, written back where it stood.

A multimodal Gemma 3 holds its decoder under ``language_model.model.`` (as its makers and
transformers write it) or ``model.language_model.``, beside a vision tower and a projector. Here the
decoder's tensors go by the names that a text model has; the others are kept apart, so that an
export can copy them and nothing of the model is lost.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from smoa_jax.checkpoint.assemble import Index, StoredTensor
from smoa_jax.checkpoint.errors import CheckpointError
from smoa_jax.checkpoint.huggingface.safetensors_files import SafetensorsFiles
from smoa_jax.checkpoint.names import HEAD_NAME

# What stands before a name of the text model on disk -> what stands there in a text model.
_PREFIXES = {"language_model.": "", "model.language_model.": "model."}
_PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "chat_template.json",
)


class TextPart:
    """A ``TensorReader`` of the decoder's tensors alone.

    Attributes:
        stored_names: Name in a text model -> name on disk.
        others: Names on disk of everything else.
        files: All tensors, under their names on disk.
    """

    def __init__(self, files: SafetensorsFiles):
        self.files = files
        self.source = files.source
        self.stored_names: dict[str, str] = {}
        self.others: list[str] = []
        for stored in files.tensors:
            name = text_name(stored)
            if name is None:
                self.others.append(stored)
            elif name in self.stored_names:
                raise CheckpointError(
                    f"{self.source}: {stored} and {self.stored_names[name]} both hold {name}; "
                    "expected one of them"
                )
            else:
                self.stored_names[name] = stored
        self.tensors: Mapping[str, StoredTensor] = {
            name: files.tensors[stored] for name, stored in self.stored_names.items()
        }

    def read(self, name: str, index: Index) -> np.ndarray:
        return self.files.read(self.stored_names[name], index)

    def ends(self, name: str, size: int) -> tuple[bytes, bytes]:
        return self.files.ends(self.stored_names[name], size)


def text_name(stored: str) -> str | None:
    """The name in a text model of a tensor of a multimodal one; None if it is none of its."""
    if stored == HEAD_NAME:
        return stored
    for prefix, plain in _PREFIXES.items():
        if stored.startswith(prefix):
            return plain + stored.removeprefix(prefix)
    return None


def processor_files(directory: Path) -> list[Path]:
    """The files by which a multimodal model prepares its images and prompts."""
    return [path for name in _PROCESSOR_FILES if (path := directory / name).is_file()]
