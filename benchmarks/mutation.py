"""A sample of a mutation run: which mutants to try, and which tests try them.

    cosmic-ray init benchmarks/mutation.toml mutation.sqlite
    python benchmarks/mutation.py sample mutation.sqlite --count 120 --seed 0
    cosmic-ray exec benchmarks/mutation.toml mutation.sqlite      # in a clone: it edits the files
    cr-report mutation.sqlite --show-diff --surviving-only

All mutants would take days, since every one compiles its programs anew; so a sample, drawn evenly
over files, of operators that change what is computed (``x | None`` in a type is no union to lose).
"""

from __future__ import annotations

import argparse
import random
import re
import sqlite3
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
#: Operators whose mutants mean another computation.
OPERATORS = (
    r"NumberReplacer|AddNot|ReplaceTrueWithFalse|ReplaceFalseWithTrue|Replace(Or|And)With(And|Or)|"
    r"ZeroIterationForLoop|ReplaceBinaryOperator_(Mul_Div|Div_Mul|Add_Sub|Sub_Add|Pow_Mul|Mod_Div)|"
    r"ReplaceUnaryOperator_(USub_UAdd|Delete_Not)|Replace(Continue|Break)With(Break|Continue)|"
    r"ReplaceComparisonOperator_(Eq_NotEq|NotEq_Eq|Lt_LtE|LtE_Lt|Gt_GtE|GtE_Gt|Is_IsNot|IsNot_Is)"
)
#: Part of a file's path -> the tests that should notice.
TESTS = {
    "adapter/planning": "tests/adapter/planning tests/adapter/test_laws.py",
    "adapter/fingerprint": "tests/adapter/test_fingerprint.py",
    "adapter/targets": "tests/adapter/test_targets.py",
    "adapter/config": "tests/adapter/test_targets.py tests/adapter/test_laws.py",
    "adapter": "tests/adapter --ignore tests/adapter/planning tests/checkpoint/native",
    "evaluation/answers": "tests/evaluation/test_answers.py",
    "evaluation/scoring": "tests/evaluation/test_scoring.py",
    "evaluation/inspection": "tests/evaluation/test_inspection.py",
    "evaluation/plots": "tests/evaluation/test_plots.py",
    "training/checks": "tests/training/test_checks.py tests/cli/test_refused_runs.py",
    "training/environment": "tests/training/test_environment.py",
    "training/trackers": "tests/training/test_trackers.py",
    "training/loss": "tests/training/test_loss.py",
    "training/step": "tests/training/test_step.py",
    "training/optimizer": "tests/training/test_optimizer.py",
    "training/config": "tests/training/test_config.py",
    "training/checkpoint": "tests/training/test_checkpoints.py",
    "training/directory": "tests/training/test_directory.py",
    "training/saved_adapter": "tests/training/test_saved_adapter.py",
    "training": "tests/training/test_loop.py tests/training/test_run.py",
}


def sample(session: str, count: int, seed: int) -> None:
    """Leave ``count`` mutants in a session, drawn evenly over files."""
    database = sqlite3.connect(session)
    rows = database.execute("select job_id, module_path, operator_name from mutation_specs")
    by_file: dict[str, list[str]] = {}
    for job, path, operator in rows:
        if re.search(rf"/({OPERATORS})$", operator):
            by_file.setdefault(path, []).append(job)
    draw = random.Random(seed)
    for jobs in by_file.values():
        draw.shuffle(jobs)
    order = [jobs[n] for n in range(max(map(len, by_file.values()))) for jobs in by_file.values()
             if n < len(jobs)]  # fmt: skip
    kept = set(order[:count])
    for table in ("mutation_specs", "work_items"):
        for (job,) in database.execute(f"select job_id from {table}").fetchall():
            if job not in kept:
                database.execute(f"delete from {table} where job_id = ?", (job,))
    database.commit()
    print(f"{len(kept)} of {len(order)} mutants of {len(by_file)} files")


def test() -> int:
    """Run the tests of the file that is changed."""
    diff = ["git", "diff", "--name-only", "--", "smoa_jax"]
    (changed,) = subprocess.run(
        diff, cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split()
    tests = next(tests for part, tests in TESTS.items() if f"smoa_jax/{part}" in changed)
    command = [sys.executable, "-m", "pytest", "-x", "-q", *tests.split()]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    commands = parser.add_subparsers(dest="command", required=True)
    sampling = commands.add_parser("sample")
    sampling.add_argument("session")
    sampling.add_argument("--count", type=int, default=120)
    sampling.add_argument("--seed", type=int, default=0)
    commands.add_parser("test")
    given = parser.parse_args()
    if given.command == "test":
        sys.exit(test())
    sample(given.session, given.count, given.seed)
