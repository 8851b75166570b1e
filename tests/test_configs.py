"""Every configuration in the repository parses, and its comments say what is true of it.

A comment's numbers are recomputed: trained parameters from the published shapes of its model
(``tests/models/real_configs.py``), bytes a device from the shardings of the run's own mesh. The
table in ``configs/README.md`` repeats the comments, so it is compared with them.
"""

from __future__ import annotations

import dataclasses
import math
import re
import shlex
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh

from smoa_jax.adapter.config import SmoaConfig
from smoa_jax.adapter.tree import apply_smoa, count_trainable, trainable_mask
from smoa_jax.cli import _parse, command_parser, main, parse_run
from smoa_jax.experiments.config import ExperimentConfig
from smoa_jax.models.params import abstract_params
from smoa_jax.models.stacks import layer_stacks
from smoa_jax.parsing import instantiated
from smoa_jax.sharding.mesh import AXES, check_batch
from smoa_jax.sharding.rules import check_heads, param_shardings
from smoa_jax.training.config import RunConfig
from tests.models.real_configs import REAL_GEMMA4, RealModel
from tests.models.real_configs import REAL_MODELS as ONE_SHAPE

ROOT = Path(__file__).parents[1]
REAL_MODELS = ONE_SHAPE | REAL_GEMMA4
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
STUDY = sorted((ROOT / "configs" / "study").glob("*.yaml"))

every_config = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Header:
    """What the comment at the top of a configuration says, by its words in the first column."""

    model: str
    task: str
    data: str
    adapter: str
    hardware: tuple[str, ...]
    status: str
    command: str


def header_of(path: Path) -> Header:
    found: dict[str, list[str]] = {}
    word = ""
    for line in path.read_text().splitlines():
        entry = re.fullmatch(r"#   (?:(\w+)|   ) +(\S.*)", line)
        if not line.startswith("#"):
            break
        if not entry:
            word = ""
        elif entry[1]:
            word = entry[1]
            found.setdefault(word, []).append(entry[2])
        elif word:
            found[word][-1] = f"{found[word][-1].removesuffix(chr(92)).rstrip()} {entry[2]}"
    single = {word: texts[0] for word, texts in found.items() if word != "hardware"}
    return Header(hardware=tuple(found["hardware"]), **single)


def config_of(path: Path) -> RunConfig:
    return parse_run(["--config", str(path)])


def abstract_tree(model: RealModel, adapter: SmoaConfig, dtype: str) -> dict:
    return apply_smoa(abstract_params(model.config, dtype), adapter, jax.random.key(0))


# -------------------------------------------------------------- what the comments' numbers must be


def adapter_numbers(config: RunConfig, model: RealModel) -> str:
    trained = count_trainable(abstract_params(model.config), config.adapter)
    return f"{trained:,} trained parameters, {100 * trained / model.parameters:.2f} % of the base"


def run_mesh(config: RunConfig, devices: int) -> AbstractMesh:
    """The mesh of a run on so many devices, checked as a run checks it."""
    sizes = list(config.mesh.sizes)
    if -1 in sizes:
        sizes[sizes.index(-1)] = devices // -math.prod(sizes)
    assert math.prod(sizes) == devices
    return AbstractMesh(tuple(sizes), AXES)


def device_bytes(config: RunConfig, model: RealModel, devices: int, dtype: str) -> int:
    """Weights, modulations and Adam's two moments of every factor, on each device."""
    params = abstract_tree(model, config.adapter, dtype)
    shardings = param_shardings(params, run_mesh(config, devices), config.model.sharding_rules)
    copies = jax.tree.map(lambda trains: 3 if trains else 1, trainable_mask(params))
    sizes = jax.tree.map(
        lambda leaf, where, count: (
            count * math.prod(where.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        ),
        params,
        shardings,
        copies,
    )
    return sum(jax.tree.leaves(sizes))


def hardware_numbers(config: RunConfig, model: RealModel, devices: int, name: str) -> str:
    dtype = config.model.dtype
    if dtype == "auto":
        dtype = "float32" if name == "CPU" else "bfloat16"
    size = device_bytes(config, model, devices, dtype) / 1e9
    return f"{size:.2f} GB of weights and optimizer state on each"


HARDWARE = re.compile(r"(\d+) x ([^,]+), (?:(\d+) GB each|float32): (.+)")


# ------------------------------------------------------------------------------------------ tests


@every_config
def test_every_configuration_parses(path):
    assert config_of(path).train.output_dir.startswith("runs/")


def test_no_two_configurations_write_to_the_same_directory():
    directories = [config_of(path).train.output_dir for path in CONFIGS]
    assert len(set(directories)) == len(directories)


@every_config
def test_the_comment_counts_the_trained_parameters(path):
    header = header_of(path)
    if header.model == "any":
        assert "trained parameters" not in header.adapter
        return
    model = REAL_MODELS[header.model]
    method, _, numbers = header.adapter.partition(": ")
    assert numbers == adapter_numbers(config_of(path), model)
    assert method == method_name(config_of(path).adapter)


def method_name(adapter: SmoaConfig) -> str:
    names = {
        ("none", "none"): "LoRA",
        ("none", "weight"): "HiRA",
        ("spectral_blocks", "weight"): "SMoA, spectral blocks",
        ("spectral_bands", "weight"): "SMoA, spectral bands",
    }
    return names[adapter.partition, adapter.modulation]


@every_config
def test_the_comment_says_what_a_device_holds_and_the_run_fits_its_mesh(path):
    header, config = header_of(path), config_of(path)
    if header.model == "any":
        return
    model = REAL_MODELS[header.model]
    assert header.hardware
    for line in header.hardware:
        found = HARDWARE.fullmatch(line)
        assert found, line
        devices, name, capacity, numbers = found.groups()
        assert numbers == hardware_numbers(config, model, int(devices), name)
        if capacity:
            assert float(numbers.split()[0]) < float(capacity)
        mesh = run_mesh(config, int(devices))
        check_batch(mesh, config.train.batch_size // config.train.accumulate)
        for stack in layer_stacks(model.config):
            check_heads(model.config.num_heads, stack.shape.num_kv_heads, mesh)


@every_config
def test_the_comment_names_the_model_that_the_run_loads(path):
    header, config = header_of(path), config_of(path)
    if header.model == "any" or config.model.path.endswith(".gguf"):
        return
    repository = REAL_MODELS[header.model].repository
    assert config.model.path in (repository, f"{repository}-Instruct")
    assert config.data.max_length <= REAL_MODELS[header.model].config.max_positions


@every_config
def test_the_command_of_the_comment_is_one_that_runs_this_file(path):
    words = shlex.split(header_of(path).command)
    if words[:1] == ["make"]:
        assert re.search(rf"^{words[1]}:.*\n\t.*examples/{words[1]}\.py", makefile(), re.MULTILINE)
        assert f'"{path.name}"' in (ROOT / "examples" / f"{words[1]}.py").read_text()
        return
    assert words[:2] == ["python", "train.py"]
    assert parse_run(words[2:]).train == config_of(path).train or path.stem == "files"
    assert words[words.index("--config") + 1] == f"configs/{path.name}"


def makefile() -> str:
    return (ROOT / "Makefile").read_text()


def commonsense(method: str = "", *changes: str) -> RunConfig:
    """Llama 3.1 8B on commonsense with the method itself ("") or with one of its baselines."""
    path = ROOT / "configs" / f"llama-3.1-8b-commonsense{method and '-'}{method}.yaml"
    return parse_run(["--config", str(path), *changes])


@pytest.mark.parametrize("method", ["bands", "hira", "lora"])
def test_a_baseline_trains_twice_the_parameters_and_as_many_at_half_the_rank(method):
    base = abstract_params(REAL_MODELS["Llama-3.1-8B"].config)
    blocks = count_trainable(base, commonsense().adapter)
    assert count_trainable(base, commonsense(method).adapter) == 2 * blocks
    half = commonsense(method, "--adapter.rank", "16").adapter
    assert count_trainable(base, half) == blocks


@pytest.mark.parametrize("method", ["bands", "hira", "lora"])
def test_a_baseline_differs_from_the_method_in_nothing_but_the_adapter(method):
    ours, other = commonsense(), commonsense(method)
    assert other.adapter != ours.adapter
    assert (other.adapter.rank, other.adapter.target_modules) == (32, ours.adapter.target_modules)
    same_train = dataclasses.replace(other.train, output_dir=ours.train.output_dir)
    same_model = dataclasses.replace(other.model, spectra_cache=ours.model.spectra_cache)
    same = dataclasses.replace(other, adapter=ours.adapter, train=same_train, model=same_model)
    assert same == ours


def test_hira_trains_the_share_of_llama_3_8b_that_its_paper_prints():
    base = abstract_params(REAL_MODELS["Llama-3.1-8B"].config, jnp.bfloat16)
    trained = count_trainable(base, SmoaConfig.hira(32))
    assert f"{100 * trained / (REAL_MODELS['Llama-3.1-8B'].parameters + trained):.2f}" == "0.70"


def readme_rows() -> dict[str, dict[str, str]]:
    lines = (ROOT / "configs" / "README.md").read_text().splitlines()
    cells = [
        [cell.strip().strip("`") for cell in line.strip("|").split("|")]
        for line in lines
        if line.startswith("|")
    ]
    titles, rows = cells[0], cells[2:]
    return {row[0]: dict(zip(titles, row, strict=True)) for row in rows}


def test_the_readme_has_one_row_for_every_configuration():
    assert sorted(readme_rows()) == [path.name for path in CONFIGS]


@every_config
def test_the_readmes_row_repeats_the_comment(path):
    header, row = header_of(path), readme_rows()[path.name]
    assert (row["model"], row["task"]) == (header.model, header.task)
    method, _, numbers = header.adapter.partition(": ")
    assert row["adapter"] == method.partition(";")[0]
    assert row["trained"] == (numbers.split()[0] if numbers else "")
    devices = [line.partition(":")[0] for line in header.hardware]
    assert row["hardware"] == " or ".join(devices)
    assert row["command"] == header.command


def test_the_readmes_other_commands_parse():
    text = (ROOT / "configs" / "README.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"^(?:python train\.py|smoa evaluate) (.+)$", text, re.MULTILINE)
    assert commands
    for command in commands:
        words = shlex.split(command)
        if "--adapter" in words:  # of evaluate, a directory
            at = words.index("--adapter")
            del words[at : at + 2]
        parse_run(words)


@pytest.mark.parametrize("path", STUDY, ids=lambda path: path.stem)
def test_a_grid_holds_the_trained_parameters_equal_that_its_comment_names(path):
    parser = command_parser("experiment")
    config = instantiated(parser, _parse(parser, ["--config", str(path)]), ExperimentConfig)
    base = abstract_params(REAL_MODELS["SmolLM2-135M"].config)
    counts = {count_trainable(base, method.adapter) for method in config.grid.methods.values()}
    comment = " ".join(
        line.lstrip("# ") for line in path.read_text().split("model:")[0].split("\n")
    )
    assert [f"{count:,}" for count in counts] == re.findall(r"(\d+,\d+) trained", comment)
    assert f"smoa experiment --config configs/study/{path.name}" in comment


def test_an_unknown_key_is_one_line_and_exit_status_two(tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text("model: {path: x}\ntrain: {output_dir: y, stepz: 3}\n")
    assert main(["train", "--config", str(config)]) == 2
    error = capsys.readouterr().err
    assert "stepz" in error
    assert len(error.strip().splitlines()) == 1
