"""Who may import whom: the method knows nothing of the rest, and nobody knows the command line."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "smoa_jax"
#: Part of the package -> the other parts that it may import. "" is ``smoa_jax/__init__.py``.
MAY_IMPORT = {
    # When first asked for.
    "": {"adapter", "models", "sharding", "checkpoint", "data", "training"},
    "adapter": set(),
    "models": {"adapter"},
    "sharding": {"adapter"},
    "checkpoint": {"adapter", "models", "sharding"},
    "data": set(),
    "evaluation": {"adapter", "models", "sharding", "checkpoint", "data"},
    "training": {"adapter", "models", "sharding", "checkpoint", "data", "evaluation"},
    "experiments": {
        *("adapter", "models", "sharding", "checkpoint", "data", "evaluation", "training"),
    },
    "planning": {"adapter", "models", "sharding", "checkpoint", "training"},
    "commands": {
        *("adapter", "models", "sharding", "checkpoint", "data", "evaluation", "training"),
        *("experiments", "planning"),
    },
}
#: The one way to refuse, and where names point, here or in a bucket.
EVERYONE_MAY_IMPORT = {"checks", "storage"}
MAY_IMPORT["checks"] = MAY_IMPORT["storage"] = set()
MAY_IMPORT["parsing"] = {"commands"}
MAY_IMPORT["cli"] = MAY_IMPORT["commands"] | {"commands", "parsing", ""}  # for __version__
#: What the core may import besides the standard library.
CORE_LIBRARIES = {
    "jax",
    "numpy",
    "jaxtyping",
    # Planning gives each decomposition one BLAS thread; nothing in JAX or NumPy can say so.
    "threadpoolctl",
}
FILES = sorted(PACKAGE.rglob("*.py"))


def imported_names(path: Path) -> Iterator[str]:
    """Every absolute dotted name that a file imports, lazily or not."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import; expected absolute ones"
            # "from smoa_jax import cli" imports smoa_jax.cli.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part_of(path: Path) -> str:
    """``adapter`` for a file in ``smoa_jax/adapter``, ``cli`` for ``smoa_jax/cli.py``."""
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def project_parts(path: Path) -> set[str]:
    """The parts of the project that a file imports."""
    names = [name.split(".") for name in imported_names(path)]
    known = set(MAY_IMPORT)
    return {parts[1] if parts[1] in known else "" for parts in names if parts[0] == "smoa_jax"}


def test_every_part_of_the_package_has_its_line_in_the_table():
    assert {part_of(path) for path in FILES} == set(MAY_IMPORT)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_only_what_its_part_may(path):
    part = part_of(path)
    forbidden = project_parts(path) - MAY_IMPORT[part] - EVERYONE_MAY_IMPORT - {part}
    assert not forbidden, f"{path} imports {sorted(forbidden)}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "adapter").rglob("*.py")), ids=lambda p: p.stem)
def test_the_core_imports_few_libraries(path):
    libraries = {name.split(".")[0] for name in imported_names(path)}
    assert libraries - set(sys.stdlib_module_names) - {"smoa_jax"} <= CORE_LIBRARIES


def test_only_the_command_line_imports_the_configuration_parser():
    users = [path for path in FILES if any("jsonargparse" in name for name in imported_names(path))]
    assert users == [PACKAGE / "cli.py", PACKAGE / "parsing.py"]


def test_importing_the_core_loads_no_framework_and_starts_no_backend():
    program = (
        "import sys, smoa_jax\n"
        "from jax._src import xla_bridge\n"
        "unwanted = {'flax', 'transformers', 'torch', 'orbax', 'optax', 'grain', 'safetensors'}\n"
        "print(sorted(unwanted & set(sys.modules)), bool(xla_bridge._backends))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split("\n")[0] == "[] False"
