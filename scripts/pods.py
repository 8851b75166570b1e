"""Plans of the configurations on the slices that they name, and docs/pods.md out of them.

    python scripts/pods.py [--config NAME ...] [--topology NAME ...] [--write]

A TPU's step takes minutes to compile, so results are kept in docs/assets/pods.json, a plan at a
time, and the page lists those that are there. ``--write`` only writes the page.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax

from smoa_jax.checkpoint.huggingface.config import config_to_hf
from smoa_jax.planning.chips import parse_topology
from tests.models.real_configs import REAL_GEMMA4, REAL_MODELS

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "docs" / "assets" / "pods.json", ROOT / "docs" / "pods.md"


def claims() -> list[tuple[str, str, str]]:
    """Configuration, model and slice, of every accelerator in the headers."""
    found = []
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        text = path.read_text()
        model = re.search(r"^#   model +(\S+)", text, re.MULTILINE)
        for count, name, size in re.findall(
            r"^#   hardware +(\d+) x ([^,]+), (\d+) GB", text, re.M
        ):
            if name.startswith("TPU "):
                chip = name.removeprefix("TPU ")
                cores = parse_topology(chip).chip.cores
                topology = f"{chip}-{int(count) * cores}"
            else:
                topology = f"{name.lower()}{'-40gb' if size == '40' else ''}x{count}"
            assert model
            found.append((path.stem, model[1], topology))
    return found


def planned(config: str, model: str, topology: str) -> dict[str, Any]:
    """What ``smoa plan`` says, of a directory with nothing but the model's ``config.json``."""
    with tempfile.TemporaryDirectory() as directory:
        known = (REAL_MODELS | REAL_GEMMA4)[model]
        fields = config_to_hf(known.config, dtype="bfloat16")
        (Path(directory) / "config.json").write_text(json.dumps(fields))
        words = ["--config", f"configs/{config}.yaml", "--model.path", directory]
        command = [sys.executable, "-m", "smoa_jax.cli", "plan", *words]
        done = subprocess.run(
            [*command, "--topology", topology, "--json"], cwd=ROOT, capture_output=True, text=True
        )
    if done.returncode not in (0, 1):
        sys.exit(f"{config} on {topology}: {done.stderr.strip().splitlines()[-1]}")
    made = json.loads(done.stdout)
    versions = {"jax": jax.__version__}
    if not made["plans"][0]["estimated"]:
        versions["libtpu"] = importlib.metadata.version("libtpu")
    return {"config": config, "model": model, "topology": topology, **versions, **made}


def gib(size: float) -> str:
    return f"{size / 2**30:.2f}"


def row(result: dict[str, Any]) -> str:
    found = result["plans"][0]
    mesh = " x ".join(f"{axis} {size}" for axis, size in found["mesh"].items() if size > 1)
    kinds = ", ".join(
        f"{kind} {gib(size)}"
        for kind, size in sorted(found["collectives"].items(), key=lambda item: -item[1])
        if size >= 2**20
    )
    bounds = found["bounds"]
    limit = max(bounds, key=bounds.get)
    cells = [
        f"`{result['config']}.yaml`",
        f"`{result['topology']}`",
        mesh or "one",
        f"{found['batch_size']} x {found['length']}",
        found["remat"],
        gib(found["base"]),
        gib(found["adapter"] + found["optimizer"]),
        gib(found["temporaries"]),
        f"**{gib(found['bytes'])}** of {gib(result['chip']['memory'])}",
        "yes" if found["fits"] else "**no**",
        f"{found['flops'] / 1e12:.0f}",
        kinds or "-",
        f"{1e3 * bounds[limit]:.0f} ms, {limit}",
        f"{found['mfu']:.0%}",
        f"{found['compile_seconds']:.0f} s" if found["compile_seconds"] else "-",
    ]
    return f"| {' | '.join(cells)} |"


_COLUMNS = (
    "configuration",
    "slice",
    "mesh",
    "rows x tokens",
    "remat",
    "base, GiB",
    "adapter and optimizer",
    "temporaries",
    "together",
    "fits",
    "TFLOP a step",
    "over links, GiB a chip",
    "a step at least",
    "MFU at most",
    "compiled in",
)
_TEXT = """\
# Pods

Does it fit, and how fast can it be, before anything is rented? `smoa plan` builds the training step
that a run builds, same function and same shardings, for chips that aren't there:

```sh
smoa plan --config configs/llama-3.1-8b-commonsense.yaml --topology v5e-16
smoa plan --model.path DIRECTORY --topology h100x8 --search
smoa plan --config mine.yaml --topology v6e-64 --remat all
```

Of the model only `config.json` is read. For TPUs the step is compiled by their own compiler
(libtpu; no TPU is needed), and memory and collectives are its word; a loop's body counts as often
as it runs. For GPUs there is no such compiler to hand, and both are estimated: on eight host
devices the estimate lies within a factor of two of what XLA allocates
(`tests/planning/test_estimate.py`). Of one step on one H200
([Performance](performance.md): Llama-3.2-1B, 8 x 1024 tokens, slices with M = 4) it says 8.34 GiB
of temporaries and at least 50 ms; XLA took 7.36 GiB, and the step took 125 ms. `--estimate`
does the same for a TPU, in seconds.

Products are counted where JAX has written them down, with the length of every scan. **Times are
bounds**: products, weights and links each at the published peak, the slowest of the three, all else
overlapped. MFU counts the frozen model's own products, forward and back to its activations. **None
of these runs has been made.**

`--search` finds the largest batch that fits, a compilation a try. The exit status is 1 where
nothing fits.
"""


def page(results: list[dict[str, Any]]) -> str:
    """The page: what a TPU's compiler says, then estimates."""
    head = f"| {' | '.join(_COLUMNS)} |\n|{'---|' * len(_COLUMNS)}"
    parts = [_TEXT]
    compiled = [result for result in results if not result["plans"][0]["estimated"]]
    estimated = [result for result in results if result["plans"][0]["estimated"]]
    if compiled:
        versions = sorted({f"jax {each['jax']}, libtpu {each['libtpu']}" for each in compiled})
        parts.append(
            f"## TPUs, compiled\n\nBytes are a chip's ({'; '.join(versions)}, 2 shared CPU cores; "
            "`python scripts/pods.py`). Rows that aren't here weren't compiled.\n"
        )
        parts.append("\n".join([head, *map(row, compiled)]) + "\n")
    if estimated:
        parts.append("## GPUs, estimated\n")
        parts.append("\n".join([head, *map(row, estimated)]) + "\n")
    return "\n".join(parts)


def main() -> None:
    """Plan what is asked for, keep it, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", nargs="*", default=[])
    parser.add_argument("--topology", nargs="*", default=[])
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    for config, model, topology in claims():
        asked = (not arguments.config or config in arguments.config) and (
            not arguments.topology or topology in arguments.topology
        )
        if arguments.write or not asked:
            continue
        made = planned(config, model, topology)
        kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else []  # another may have run
        kept = [old for old in kept if (old["config"], old["topology"]) != (config, topology)]
        kept = sorted([*kept, made], key=lambda each: (each["config"], each["topology"]))
        RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
        print(row(made), flush=True)
    PAGE.write_text(page(kept))


if __name__ == "__main__":
    main()
