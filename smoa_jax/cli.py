"""The command line; ``parsing.py`` has the configuration parser.

    smoa train     --config FILE [--section.key VALUE ...] [--resume | --overwrite]
    smoa evaluate  --adapter DIR [--data.eval_files FILES] [--section.key VALUE ...]
    smoa generate  --model PATH [--adapter DIR] --prompt TEXT [--prompt TEXT ...]
    smoa export    --model PATH --adapter DIR --output DIR [--format huggingface | orbax | peft]
    smoa import    --model PATH --peft DIR --output DIR
    smoa inspect   --model PATH [--adapter DIR [--compare DIR]] [--plot FILE.png]
    smoa experiment --config GRID [--section.key VALUE ...]
    smoa report    LEDGER [LEDGER ...] [--output DIR]
    smoa plan      --config FILE --topology v5e-16 [--search] [--remat all]
    smoa upload    --directory DIR --name ORGANISATION/NAME

``python train.py`` is ``smoa train``. Bad input is one line on standard error and exit status 2; a
run that was asked to stop and has saved exits with 75, one that another process has left alone with
76, an aborted one with 130. Until a command is known, nothing heavy is imported.
"""

from __future__ import annotations

import difflib
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smoa_jax.checks import how_to_install, require
from smoa_jax.commands.help import COMMANDS, first_page
from smoa_jax.parsing import (
    config_parser,
    function_parser,
    instantiated,
    parse,
    plain_parser,
)

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from smoa_jax.training.config import RunConfig


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``smoa``; returns the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["--version"]:
        from smoa_jax import __version__

        print(f"smoa {__version__}")
        return 0
    if not words or words[0] in ("-h", "--help"):
        print(first_page(), end="")
        return 0 if words else 2
    command = words[0]
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return _fail(f"got command {command!r}; expected {', '.join(COMMANDS)}{hint}")
    return _run(command, words[1:])


def train_main(arguments: Sequence[str] | None = None) -> int:
    """Run ``train.py``; returns the exit status."""
    return _run("train", list(sys.argv[1:] if arguments is None else arguments))


def command_parser(command: str) -> ArgumentParser:
    """The parser of a command's options, as ``smoa COMMAND --help`` shows them."""
    return _TABLE[command][0]()


def parse_run(arguments: Sequence[str]) -> RunConfig:
    """A run's configuration from ``--config FILE`` and overrides, validated.

    Raises:
        ValueError: in one line.
    """
    parser = _run_parser("train")
    return _run_config(parser, _parse(parser, arguments))


def _run(command: str, arguments: list[str]) -> int:
    _quieten_libraries()
    try:
        return _TABLE[command][1](arguments)
    except SystemExit as done:  # --help and --print_config, once they have printed
        return int(done.code or 0)
    except ModuleNotFoundError as error:
        if not error.name or error.name.startswith("smoa_jax"):
            return _fail(str(error))
        return _fail(
            f"got no module {error.name}; expected the extra 'train', which the command line "
            f"needs; {how_to_install('train')}"
        )
    except (ValueError, OSError, ImportError) as error:
        remedy = getattr(error, "remedy", "")
        return _fail(f"{error}; {remedy}" if remedy else str(error))
    except RuntimeError as error:
        from smoa_jax.sharding.processes import end_if_another_is_lost

        end_if_another_is_lost(None, error, None)
        raise
    except KeyboardInterrupt:
        stands = "; --resume goes on from the last checkpoint, or from the start if there is none"
        return _fail("interrupted" + (stands if command == "train" else ""), 130)


def _fail(message: str, status: int = 2) -> int:
    first = " ".join(message.split())
    print(f"smoa: error: {first}", file=sys.stderr)
    return status


def _quieten_libraries() -> None:
    """Keep what libraries say of themselves out of a run's output; warnings stay."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    for name in ("absl", "orbax", "jax._src.xla_bridge", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _parse(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    return parse(parser, arguments, command_parser)


def _run_parser(command: str) -> ArgumentParser:
    from smoa_jax.training.config import RunConfig

    return config_parser(command, RunConfig, "YAML file of a run")


def _run_config(parser: ArgumentParser, parsed: Namespace) -> RunConfig:
    from smoa_jax.training.config import RunConfig

    return instantiated(parser, parsed, RunConfig)


def _train_parser() -> ArgumentParser:
    parser = _run_parser("train")
    parser.add_argument("--resume", action="store_true", help="Go on from the last checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="Delete the run that is there")
    parser.add_argument(
        "--preview",
        type=int,
        default=0,
        metavar="ROWS",
        help="Show so many rows, with what is learned of them, and do no more",
    )
    return parser


def _train(arguments: list[str]) -> int:
    from smoa_jax.commands.train import preview_rows, train

    parser = _train_parser()
    parsed = _parse(parser, arguments)
    config = _run_config(parser, parsed)
    require(parsed.preview >= 0, f"--preview {parsed.preview}", "a number of rows")
    if parsed.preview:
        return preview_rows(config, parsed.preview)
    return train(config, resume=parsed.resume, overwrite=parsed.overwrite)


def _evaluate_parser() -> ArgumentParser:
    parser = _run_parser("evaluate")
    parser.add_argument("--adapter_dir", required=True, help="Adapter directory, or a run's")
    parser.add_argument(
        "--checkpoint", default="", help="best, last or a step's number, of the run; else as it is"
    )
    parser.add_argument("--json", action="store_true", help="Print one JSON object, nothing else")
    return parser


def evaluate_words(arguments: Sequence[str]) -> list[str]:
    """The words of ``smoa evaluate`` as its parser knows them.

    The section adapter of a run's configuration has no say there, so ``--adapter`` names a
    directory; ``--adapter_dir`` is what it was called before.
    """
    return [re.sub(r"^--adapter(?=$|=)", "--adapter_dir", word) for word in arguments]


def _evaluate(arguments: list[str]) -> int:
    from smoa_jax.commands.evaluate import evaluate
    from smoa_jax.sharding.memory import exhaustion_explained

    words = evaluate_words(arguments)
    parser = _evaluate_parser()
    parser.set_defaults(_said_by_adapter(words))
    parsed = _parse(parser, words)
    config = _run_config(parser, parsed)
    remedy = (
        "lower train.eval_batch_size, evaluation.batch_size or data.max_length, or raise mesh.fsdp"
    )
    with exhaustion_explained(remedy):
        return evaluate(config, parsed.adapter_dir, str(parsed.checkpoint), as_json=parsed.json)


def _said_by_adapter(words: Sequence[str]) -> dict[str, Any]:
    """What need not be given to evaluate an adapter: its run's configuration, or its own words."""
    from smoa_jax.checkpoint.native.directory import read_adapter
    from smoa_jax.training.saved_adapter import locate, run_settings

    given = re.search(r"(?:^|\0)--adapter_dir(?:=|\0)([^\0]*)", "\0".join(words))
    if given is None:
        return {}
    directory = locate(given.group(1))
    settings = run_settings(directory)
    if settings:
        kept = ("model", "mesh", "evaluation", "data")
        flat = {
            f"{section}.{name}": value
            for section in kept
            for name, value in settings.get(section, {}).items()
        }
        sizes = {
            f"train.{name}": settings["train"][name]
            for name in ("batch_size", "accumulate", "eval_batch_size", "loss_chunk", "output_dir")
        }
        if any(word.split("=")[0] == "--data.eval_files" for word in words):
            # Other held-out rows than the run's own: nothing of it is to be taken out of them.
            named = ("source", "train_files", "hub", "eval_rows", "eval_fraction", "train_limit")
            for name in named:
                flat.pop(f"data.{name}", None)
        return flat | sizes
    description = read_adapter(directory)
    template = {"data.template": description.template} if description.template else {}
    return {"model.path": description.base_name, "train.output_dir": "unused"} | template


def _experiment_parser() -> ArgumentParser:
    from smoa_jax.experiments.config import ExperimentConfig

    return config_parser("experiment", ExperimentConfig, "YAML file of an experiment")


def _experiment(arguments: list[str]) -> int:
    from smoa_jax.commands.experiment import experiment
    from smoa_jax.experiments.config import ExperimentConfig
    from smoa_jax.sharding.memory import exhaustion_explained

    parser = _experiment_parser()
    config = instantiated(parser, _parse(parser, arguments), ExperimentConfig)
    with exhaustion_explained("lower grid.runs_at_once or evaluation.batch_size"):
        return experiment(config)


def _report_parser() -> ArgumentParser:
    parser = plain_parser("report")
    parser.add_argument("ledgers", nargs="+", metavar="LEDGER", help="Ledgers of experiments")
    parser.add_argument(
        "--output",
        default="",
        metavar="DIR",
        help="Where to write; empty: report/ beside the first",
    )
    return parser


def _report(arguments: list[str]) -> int:
    from smoa_jax.commands.report import report

    parsed = _parse(_report_parser(), arguments)
    return report(parsed.ledgers, parsed.output)


def _plan_parser() -> ArgumentParser:
    parser = _run_parser("plan")
    parser.set_defaults({"train.output_dir": "unused"})
    parser.add_argument(
        "--topology",
        required=True,
        metavar="SLICE",
        help="What to plan for: v5e-16, v5p-128, v6e-64, v5e:4x4, h100x8, a100x8 and the like",
    )
    parser.add_argument("--search", action="store_true", help="Find the largest batch that fits")
    parser.add_argument(
        "--remat", default="", metavar="all", help="all: every policy of model.remat, side by side"
    )
    parser.add_argument(
        "--estimate", action="store_true", help="Of a TPU too: estimate in place of compiling"
    )
    parser.add_argument("--json", action="store_true", help="Print one JSON object, nothing else")
    return parser


def _plan(arguments: list[str]) -> int:
    from smoa_jax.commands.plan import plan_run

    parser = _plan_parser()
    parsed = _parse(parser, arguments)
    require(parsed.remat in ("", "all"), f"--remat {parsed.remat}", "all, or --model.remat NAME")
    return plan_run(
        _run_config(parser, parsed),
        parsed.topology,
        search=parsed.search,
        every_remat=parsed.remat == "all",
        estimate=parsed.estimate,
        as_json=parsed.json,
    )


def _generate_parser() -> ArgumentParser:
    from smoa_jax.commands.generate import generate

    parser = function_parser("generate", generate, skip={"prompt", "chat"})
    parser.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        default=[],
        help="A prompt; may be given several times, or as one JSON list of texts",
    )
    parser.add_argument(
        "--prompt_file", default="", metavar="FILE", help="Prompts, one a line; - is standard input"
    )
    parser.add_argument(
        "--chat", action="store_true", help="Converse, line by line, under the template chat"
    )
    return parser


def _generate(arguments: list[str]) -> int:
    from smoa_jax.commands.generate import generate
    from smoa_jax.sharding.memory import exhaustion_explained

    parser = _generate_parser()
    options = dict(vars(parser.instantiate(_parse(parser, arguments))))
    texts = [text for word in options.pop("prompt") for text in _texts(word)]
    texts += _lines(options.pop("prompt_file"))
    with exhaustion_explained("give fewer prompts, lower --max_new_tokens, or raise --mesh.fsdp"):
        return generate(prompt=texts, **options)


def _lines(path: str) -> list[str]:
    """The lines of a file, or of standard input, that aren't empty."""
    if not path:
        return []
    if path == "-":
        return [line for line in sys.stdin.read().splitlines() if line.strip()]
    require(Path(path).is_file(), f"--prompt_file {path}", "a file of prompts, or -")
    return [line for line in Path(path).read_text("utf-8").splitlines() if line.strip()]


def _call_parser(command: str) -> ArgumentParser:
    """Of a command that is a function, with its flags as such."""
    flags = _FUNCTIONS[command][1]
    parser = function_parser(command, _function(command), skip=set(flags))
    for name, text in flags.items():
        parser.add_argument(f"--{name.removeprefix('as_')}", action="store_true", help=text)
    return parser


def _call(command: str, arguments: list[str]) -> int:
    """Run a command that is a function."""
    options = _parse(_call_parser(command), arguments).as_dict()
    flags = {name: options.pop(name.removeprefix("as_")) for name in _FUNCTIONS[command][1]}
    return _function(command)(**options, **flags)


def _function(command: str) -> Callable[..., int]:
    name = _FUNCTIONS[command][0]
    return getattr(import_module(f"smoa_jax.commands.{name}"), name)


def _texts(word: str) -> list[str]:
    """One prompt as it stands, or those of a JSON list of texts."""
    try:
        values: Any = json.loads(word) if word.lstrip().startswith("[") else None
    except json.JSONDecodeError:
        return [word]
    if isinstance(values, list) and all(isinstance(value, str) for value in values):
        return values
    return [word]


#: Commands whose options are the arguments of a function, and which of these are flags.
_FUNCTIONS: dict[str, tuple[str, dict[str, str]]] = {
    "export": ("export", {"overwrite": "Replace what output holds"}),
    "import": ("import_adapter", {"overwrite": "Replace what output holds"}),
    "inspect": (
        "inspect",
        {
            "details": "Every layer's update, not a row for each kernel",
            "as_json": "Print one JSON object, nothing else",
        },
    ),
    "upload": ("upload", {"public": "Let everybody see a repository that is made"}),
}

#: What reads the options of each command, and what then runs it.
_TABLE: dict[str, tuple[Callable[[], ArgumentParser], Callable[[list[str]], int]]] = {
    "train": (_train_parser, _train),
    "evaluate": (_evaluate_parser, _evaluate),
    "generate": (_generate_parser, _generate),
    "experiment": (_experiment_parser, _experiment),
    "report": (_report_parser, _report),
    "plan": (_plan_parser, _plan),
    **{name: (partial(_call_parser, name), partial(_call, name)) for name in _FUNCTIONS},
}

if __name__ == "__main__":
    sys.exit(main())
