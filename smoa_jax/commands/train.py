"""Train, then show what came of it."""

from __future__ import annotations

from smoa_jax.checkpoint.base import abstract_base
from smoa_jax.commands.tables import console, summary_table
from smoa_jax.data.build import build_data
from smoa_jax.data.preview import preview
from smoa_jax.data.tokenizer import load_tokenizer
from smoa_jax.sharding.processes import is_first
from smoa_jax.training.checks import advice_on_length, describe_data
from smoa_jax.training.config import RunConfig
from smoa_jax.training.run import run

#: Exit status of a run that was asked to stop and has saved: run it again with --resume. It is
#: EX_TEMPFAIL of sysexits.h, on which schedulers can requeue.
INTERRUPTED = 75


def train(config: RunConfig, *, resume: bool = False, overwrite: bool = False) -> int:
    """Train, then show what came of it; ``INTERRUPTED`` where there is more to do."""
    summary = run(config, resume=resume, overwrite=overwrite)
    if not summary.finished:
        return INTERRUPTED
    if is_first():
        console.print(summary_table(summary))
        console.print(f"adapter: {summary.adapter_dir}", soft_wrap=True, markup=False)
        console.print(
            f"next:    smoa export --model {config.model.path} --adapter {summary.adapter_dir} "
            f"--output {config.train.output_dir}/merged",
            soft_wrap=True,
            markup=False,
        )
    return 0


def preview_rows(config: RunConfig, count: int) -> int:
    """Show the first ``count`` training rows as the model would see them; nothing is written."""
    tokenizer = load_tokenizer(abstract_base(config.model.path).source)
    data = build_data(config.data, tokenizer)
    assert data.train is not None
    print(describe_data(data))
    if advice := advice_on_length(config, data):
        print(advice)
    for index in range(min(count, len(data.train.examples))):
        print(f"\n{preview(data.train.examples, index, tokenizer)}")
    return 0
