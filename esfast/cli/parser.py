"""What the command line takes: a parser for each command, without loading what the commands need."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib import import_module

from .command_help import Parser, help_options
from .options import add_options, integer
from .presets import PRESETS
from .run_options import GROUPS, OF_EPISODES, SETTINGS, TRAIN_DEFAULTS

# Settings of a run that `esfast eval` takes as options, too.
EVAL_SETTINGS = ("task", "environment", "style", "data", "reward", "dtype", "device", *OF_EPISODES)


def parser_of_all() -> argparse.ArgumentParser:
    parser = Parser(
        prog="esfast",
        **help_options(
            "Full-parameter evolution-strategies fine-tuning of language models.",
            "esfast train                        the embedded small model learns Countdown, minutes on a CPU",
            "esfast eval --model runs/qwen/model",
            "esfast train --help                 each command has a help of its own",
        ),
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train",
        help="fine-tune a model",
        **help_options(
            "Fine-tunes all weights of a causal language model and leaves a run folder: config.yaml, metrics.jsonl, "
            "journal.jsonl, summary.json, curves.png and model/ (a Hugging Face folder).",
            "esfast train                                  the embedded small model, minutes on a CPU",
            "esfast train --task sudoku                    the same on another task",
            "esfast train --preset paper/countdown-qwen2.5-3b --out runs/qwen",
            "esfast train --model FOLDER --population-size 16 --sigma 0.002",
            "esfast train --model FOLDER --task file:prompts.jsonl --reward my_rewards:brevity",
            "esfast train --preset paper/sudoku-qwen2.5-3b --print-config > run.yaml",
            "esfast train --config run.yaml --seed 1",
            "esfast train --out runs/qwen --resume --generations 800   goes on; what is not given is the run's",
        ),
    )
    _add_train_arguments(train)
    train.set_defaults(run=_command("train"))

    tune = commands.add_parser(
        "tune",
        help="find sigma and lr for a model and a task",
        **help_options(
            "Asks members at a ladder of sigmas, finds sigma and lr, and prints the evidence and the command to train "
            "with them. A number for one of the two is kept. A sigma that is found goes with groups by the tensors' "
            "scale, unless --groups names some. It trains nothing and leaves no files; at most 5 % of the run's "
            "responses are generated. "
            "`esfast train --sigma auto --lr auto` does the same, and then trains.",
            "esfast tune                                   the embedded small model",
            "esfast tune --model FOLDER --task countdown --population-size 30 --generations 300",
        ),
    )
    _add_train_arguments(tune, prints_config=False)
    tune.add_argument("--json", action="store_true", help="print the result as JSON")
    tune.set_defaults(run=_command("tune"))

    evaluate = commands.add_parser(
        "eval",
        help="accuracy of models on a task's held-out problems",
        **help_options(
            "Accuracy, reward and length of responses to a task's held-out problems, with standard errors. Several "
            "models are asked the same prompts, and the first is what the others are compared with. A model that lies "
            "in a run folder is asked what its run was trained on; options take the place of what the folder says.",
            "esfast eval                                   the embedded small model",
            "esfast eval --model runs/qwen --samples 2000 --save responses.jsonl",
            "esfast eval --model Qwen/Qwen2.5-0.5B-Instruct runs/qwen/best --task countdown",
            "esfast eval --members 5 runs/qwen             the best 5 members of the last generation vote",
        ),
    )
    _add_eval_arguments(evaluate)
    evaluate.set_defaults(run=_command("evaluate"))

    report = commands.add_parser(
        "report",
        help="runs as one HTML page",
        **help_options(
            "Makes one self-contained HTML page of runs, finished or not: curves with their spread over repeats, "
            "rewards of the members, where the time went, responses before and after, settings.",
            "esfast report runs/qwen",
            "esfast report runs/seed0 runs/seed1 runs/seed2 --out repeats.html",
            "esfast report --diagnose runs/qwen           says only what is wrong with the run, and what to change",
        ),
    )
    report.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="run folders; those that differ in their seed alone are repeats of one experiment",
    )
    where = "file to write (default: report.html in the current folder; beside it, if that is the run's own)"
    report.add_argument("--out", metavar="FILE", help=where)
    report.add_argument("--samples", type=integer, metavar="N", default=5, help="responses that are shown")
    report.add_argument(
        "--diagnose", action="store_true", help="print what is wrong with the runs and what to change; write no page"
    )
    report.set_defaults(run=_command("report"))

    replay = commands.add_parser(
        "replay",
        help="the tuned model again, from the base model and a journal",
        **help_options(
            "Makes a tuned model from the base model and the journal of a run, or what `esfast export` made of it: the "
            "same bits as the run's, on a GPU or a CPU. Fingerprints are compared before and after.",
            "esfast replay runs/qwen/journal.jsonl --base Qwen/Qwen2.5-0.5B-Instruct --out tuned",
            "esfast replay qwen.safetensors --base Qwen/Qwen2.5-0.5B-Instruct --out tuned --device cuda:1",
            "esfast replay runs/qwen/journal.jsonl --base FOLDER --out halfway --until 50   after 50 generations",
            "esfast replay runs/frozen/journal.jsonl --base FOLDER --out tuned --exclude '*embed*'   as in the run",
        ),
    )
    _add_replay_arguments(replay)
    replay.set_defaults(run=_command("replay"))

    export = commands.add_parser(
        "export",
        help="a run's journal as one small safetensors file",
        **help_options(
            "Packs the journal of a run into one safetensors file, from which `esfast replay` makes the tuned model: a "
            "fine-tune of all weights in kilobytes.",
            "esfast export runs/qwen --out qwen.safetensors",
            "esfast export runs/qwen/journal.jsonl --out qwen.safetensors",
        ),
    )
    export.add_argument("source", metavar="RUN", help="run folder, or its journal.jsonl")
    export.add_argument("--out", metavar="FILE", required=True, help="file to write, ending in .safetensors")
    export.set_defaults(run=_command("export"))

    info = commands.add_parser(
        "info",
        help="versions, devices, and which backend runs and why",
        **help_options(
            "Versions, what was built, and for each device which backend runs there and why the others don't.",
            "esfast info",
            "esfast --debug info   with the traceback of an error",
        ),
    )
    info.set_defaults(run=_command("info"))

    commands.add_parser("bench", help="benchmarks: esfast bench NAME; see esfast bench --help", add_help=False)
    return parser


def _add_train_arguments(parser: argparse.ArgumentParser, prints_config: bool = True) -> None:
    parser.add_argument("--preset", metavar="NAME", help=f"settings of an experiment: {', '.join(PRESETS)}")
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="settings from a YAML file, such as a run's config.yaml; "
        "they replace the preset's, and options replace them",
    )
    if prints_config:
        parser.add_argument("--print-config", action="store_true", help="print all settings as YAML, and train nothing")
    add_options(parser, SETTINGS, GROUPS, TRAIN_DEFAULTS)


def _add_eval_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("evaluation")
    names = "Hugging Face names or folders, or run folders (default: the embedded small model)"
    group.add_argument("--model", nargs="+", dest="models", metavar="MODEL", help=names)
    group.add_argument("runs", nargs="*", metavar="RUN", help="the same as --model")
    group.add_argument(
        "--members",
        type=integer,
        metavar="K",
        help="of one run: also the best K members of its last generation, each alone the best one and all of them by "
        "majority vote",
    )
    group.add_argument("--samples", type=integer, default=500, metavar="N", help="held-out problems")
    longest = "longest response, in tokens (default: the run's or the task's, as far as the model's context goes)"
    group.add_argument("--max-completion-length", type=integer, metavar="N", help=longest)
    group.add_argument("--batch-size", type=integer, metavar="N", help="most prompts generated at once (default: 64)")
    group.add_argument("--save", metavar="FILE", help="write the responses to a JSONL file")
    group.add_argument("--json", action="store_true", help="print the result as JSON")
    add_options(parser, SETTINGS, GROUPS, TRAIN_DEFAULTS, only=EVAL_SETTINGS)


def _add_replay_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("journal", help="journal.jsonl of a run folder, or an exported .safetensors file")
    result = parser.add_argument_group("result")
    result.add_argument("--out", metavar="FOLDER", required=True, help="folder for the tuned model; must not exist")
    result.add_argument("--until", type=integer, metavar="N", help="generations to apply (default: all)")
    base = parser.add_argument_group("base model, as in the run")
    base.add_argument("--base", metavar="MODEL", help="Hugging Face name or folder (default: the embedded model)")
    base.add_argument(
        "--adapter",
        metavar="FOLDER",
        help="PEFT adapter that the run began with (default: the folder adapter beside the journal, if it is there)",
    )
    base.add_argument("--task", default="countdown", help="of the embedded model")
    base.add_argument(
        "--include",
        nargs="+",
        metavar="PATTERN",
        help="weights that were tuned (default: all; of an adapter, those that it trains)",
    )
    base.add_argument("--exclude", nargs="+", metavar="PATTERN", help="weights that were not (default: none)")
    base.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="dtype of the weights (default: the checkpoint's)",
    )
    base.add_argument(
        "--device",
        default="auto",
        help="cpu, cuda:1, ... (default: what a backend is ready for; under torchrun a GPU for each process)",
    )


def _command(name: str) -> Callable[[argparse.Namespace], int | None]:
    """A function that imports the module of this name, when the command runs, and calls its `run`."""
    return lambda args: import_module(f".{name}", __package__).run(args)
