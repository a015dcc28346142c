"""The command line: esfast train | eval | report | replay | export | info | bench. What is heavy is imported inside."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import sys
import time
from typing import TYPE_CHECKING

from .command_help import looks

if TYPE_CHECKING:
    from .distributed import Team
    from .run_options import RunOptions

log = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0 done, 1 failed, 2 unusable arguments, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    logging.basicConfig(format="esfast: %(message)s", level=logging.WARNING)
    if argv[:1] == ["bench"]:  # benchmarks have parsers of their own
        from .bench import main as bench

        return bench(argv[1:])
    parser = _parser(full=argv[:1] in (["train"], ["eval"]))
    args = parser.parse_args(argv)
    try:
        return args.run(args) or 0
    except KeyboardInterrupt:
        print("esfast: interrupted", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
        if args.debug:
            raise
        print(f"esfast: error: {error}", file=sys.stderr)
        return 1


def _parser(full: bool) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="esfast",
        **looks(
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
        **looks(
            "Fine-tunes all weights of a causal language model and leaves a run folder: config.yaml, metrics.jsonl, "
            "journal.jsonl, summary.json, curves.png and model/ (a Hugging Face folder).",
            "esfast train                                  the embedded small model, minutes on a CPU",
            "esfast train --task sudoku                    the same on another task",
            "esfast train --preset paper/countdown-qwen2.5-3b --out runs/qwen",
            "esfast train --model FOLDER --population-size 16 --sigma 0.002",
            "esfast train --model FOLDER --task file:prompts.jsonl --reward my_rewards:brevity",
            "esfast train --preset paper/sudoku-qwen2.5-3b --print-config > run.yaml",
            "esfast train --config run.yaml --seed 1",
        ),
    )
    if full:
        _add_train_arguments(train)
    train.set_defaults(run=_train)

    evaluate = commands.add_parser(
        "eval",
        help="accuracy of models on a task's held-out problems",
        **looks(
            "Accuracy, reward and length of responses to a task's held-out problems, with standard errors. Several "
            "models are asked the same prompts, and the first is what the others are compared with.",
            "esfast eval                                   the embedded small model",
            "esfast eval --model runs/qwen/model --samples 2000 --save responses.jsonl",
            "esfast eval --model Qwen/Qwen2.5-0.5B-Instruct runs/qwen/best --task countdown",
        ),
    )
    if full:
        _add_eval_arguments(evaluate)
    evaluate.set_defaults(run=_evaluate)

    report = commands.add_parser(
        "report",
        help="runs as one HTML page",
        **looks(
            "Makes one self-contained HTML page of runs, finished or not: curves with their spread over repeats, "
            "rewards of the members, where the time went, responses before and after, settings.",
            "esfast report runs/qwen",
            "esfast report runs/seed0 runs/seed1 runs/seed2 --out repeats.html",
        ),
    )
    report.add_argument("runs", nargs="+", metavar="RUN", help="run folders; those that differ in their seed alone are "
                        "repeats of one experiment")  # fmt: skip
    report.add_argument("--out", metavar="FILE", default="report.html", help="file to write")
    report.add_argument("--samples", type=int, metavar="N", default=5, help="responses that are shown")
    report.set_defaults(run=_report)

    replay = commands.add_parser(
        "replay",
        help="the tuned model again, from the base model and a journal",
        **looks(
            "Makes a tuned model from the base model and the journal of a run, or what `esfast export` made of it: the "
            "same bits as the run's, on a GPU or a CPU. Fingerprints are compared before and after.",
            "esfast replay runs/qwen/journal.jsonl --base Qwen/Qwen2.5-0.5B-Instruct --out tuned",
            "esfast replay qwen.safetensors --base Qwen/Qwen2.5-0.5B-Instruct --out tuned --device cuda:1",
            "esfast replay runs/qwen/journal.jsonl --base FOLDER --out halfway --until 50   after 50 generations",
            "esfast replay runs/frozen/journal.jsonl --base FOLDER --out tuned --exclude '*embed*'   as in the run",
        ),
    )
    _add_replay_arguments(replay)
    replay.set_defaults(run=_replay)

    export = commands.add_parser(
        "export",
        help="a run's journal as one small safetensors file",
        **looks(
            "Packs the journal of a run into one safetensors file, from which `esfast replay` makes the tuned model: a "
            "fine-tune of all weights in kilobytes.",
            "esfast export runs/qwen --out qwen.safetensors",
            "esfast export runs/qwen/journal.jsonl --out qwen.safetensors",
        ),
    )
    export.add_argument("source", metavar="RUN", help="run folder, or its journal.jsonl")
    export.add_argument("--out", metavar="FILE", required=True, help="file to write, ending in .safetensors")
    export.set_defaults(run=_export)

    info = commands.add_parser(
        "info",
        help="versions, devices, and which backend runs and why",
        **looks(
            "Versions, what was built, and for each device which backend runs there and why the others don't.",
            "esfast info",
            "esfast --debug info   with the traceback of an error",
        ),
    )
    info.set_defaults(run=_info)

    commands.add_parser("bench", help="benchmarks: esfast bench NAME; see esfast bench --help", add_help=False)
    return parser


def _add_train_arguments(parser: argparse.ArgumentParser) -> None:
    from .presets import PRESETS
    from .run_options import add_arguments

    parser.add_argument("--preset", metavar="NAME", help=f"settings of an experiment: {', '.join(PRESETS)}")
    parser.add_argument("--config", metavar="FILE", help="settings from a YAML file, such as a run's config.yaml; "
                        "they replace the preset's, and options replace them")  # fmt: skip
    parser.add_argument("--print-config", action="store_true", help="print all settings as YAML, and train nothing")
    add_arguments(parser)


def _add_eval_arguments(parser: argparse.ArgumentParser) -> None:
    from .run_options import add_arguments

    group = parser.add_argument_group("evaluation")
    group.add_argument("--model", nargs="+", dest="models", metavar="MODEL",
                       help="Hugging Face names or folders (default: the embedded small model)")  # fmt: skip
    group.add_argument("--samples", type=int, default=500, metavar="N", help="held-out problems")
    group.add_argument("--max-completion-length", type=int, metavar="N",
                       help="longest response, in tokens (default: the task's)")  # fmt: skip
    group.add_argument("--batch-size", type=int, metavar="N", help="most prompts generated at once (default: 64)")
    group.add_argument("--save", metavar="FILE", help="write the responses to a JSONL file")
    group.add_argument("--json", action="store_true", help="print the result as JSON")
    add_arguments(parser, ("task", "style", "data", "reward", "dtype", "device"))


def _add_replay_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("journal", help="journal.jsonl of a run folder, or an exported .safetensors file")
    result = parser.add_argument_group("result")
    result.add_argument("--out", metavar="FOLDER", required=True, help="folder for the tuned model; must not exist")
    result.add_argument("--until", type=int, metavar="N", help="generations to apply (default: all)")
    base = parser.add_argument_group("base model, as in the run")
    base.add_argument("--base", metavar="MODEL", help="Hugging Face name or folder (default: the embedded model)")
    base.add_argument("--task", default="countdown", help="of the embedded model")
    base.add_argument("--include", nargs="+", metavar="PATTERN", help="weights that were tuned (default: all)")
    base.add_argument("--exclude", nargs="+", metavar="PATTERN", help="weights that were not (default: none)")
    base.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"),
                      help="dtype of the weights (default: the checkpoint's)")  # fmt: skip
    base.add_argument("--device", default="auto", help="cpu, cuda:1, ... (default: what a backend is ready for; "
                      "under torchrun a GPU for each process)")  # fmt: skip


def _train(args: argparse.Namespace) -> None:
    from . import embedded
    from .distributed import Team
    from .run_folder import RunFolder
    from .run_options import dump, es_config, given, run_options
    from .trainer import ESTrainer

    settings = given(args)
    run = run_options(settings)
    if run.engine != "vllm" and run.num_engines != 1:
        raise ValueError("--num-engines is of --engine vllm; without it, use torchrun")
    if args.print_config:
        print(dump(run, es_config(_defaults(run, _task(run)) | settings)), end="")
        return
    team = Team.join(_device(run), 1 if run.engine == "vllm" else run.tensor_parallel_size)
    if run.engine == "vllm" and team.size > 1:
        raise ValueError("--engine vllm: one process trains, without torchrun; --num-engines says how many engines")
    if team.size > 1 and "output_dir" not in settings:
        raise ValueError("--out: give the run folder: with several processes a restart must find it again")
    if "output_dir" in settings and team.rank == 0:  # before minutes of loading
        RunFolder.claim(settings["output_dir"], settings.get("resume", False) or team.restarted)
    task = _task(run)
    config = es_config(_defaults(run, task) | settings)
    eval_rows = task.eval_rows(config.eval_prompts)
    if not eval_rows:
        log.warning("no problems of %s are held out, so nothing is evaluated", run.data or run.task)
    began = time.perf_counter()
    if run.model is None:  # one process makes it, the others find it
        team.tell("embedded model", lambda: str(embedded.cached(task=run.task)).encode())
    data = {
        "train_dataset": lambda generation, count: task.train_rows(generation, count, config.seed),
        "eval_dataset": eval_rows or None,
        "metrics": {} if task.accuracy is None else {"accuracy": task.accuracy},
    }
    if run.engine == "vllm":
        from .integrations.fleet import FleetTrainer

        pretraining = 0.0
        path = run.model if run.model is not None else str(embedded.cached(task=run.task))
        trainer = FleetTrainer(
            path, list(task.reward_funcs), config, run.num_engines, run.tensor_parallel_size, run.dtype, **data
        )
    else:
        model, tokenizer = _load(run, team)
        pretraining = time.perf_counter() - began if run.model is None else 0.0
        trainer = ESTrainer(model, list(task.reward_funcs), config, processing_class=tokenizer, team=team, **data)
    trainer.described = dataclasses.asdict(run)
    if team.rank:
        trainer.train()
        return
    print(f"{trainer.es.plan!r}, {run.model or 'embedded model'} on {task.name} -> {config.output_dir}")
    try:
        trainer.train()
    finally:
        if trainer.summary:
            print(_summary(trainer, pretraining))


def _defaults(run: RunOptions, task) -> dict:
    """What the task and the embedded model change of ESConfig's defaults."""
    from . import embedded

    return {
        "output_dir": f"runs/{task.name}-{time.strftime('%Y%m%d-%H%M%S')}",
        "max_completion_length": task.max_new_tokens,
        "reward_workers": 1,  # tasks' rewards are functions of a module, and of their arguments alone
        **task.settings,
        **(embedded.settings(task.name) if run.model is None else {}),
    }


def _report(args: argparse.Namespace) -> None:
    from .report import load, page
    from .run_folder import write_whole

    write_whole(args.out, page([load(run) for run in args.runs], args.samples))
    print(f"report: {args.out}")


def _replay(args: argparse.Namespace) -> None:
    from pathlib import Path

    from .journal import replay
    from .plan import Plan
    from .run_folder import save_model

    if Path(args.out).exists():
        raise FileExistsError(f"--out: {args.out} exists already; choose another folder, or move it away")
    args.model = args.base
    model, tokenizer = _load(args)
    replay(Plan(model, args.include, args.exclude), args.journal, args.until)
    save_model(Path(args.out), model, tokenizer)
    print(f"tuned model: {args.out}")


def _export(args: argparse.Namespace) -> None:
    from pathlib import Path

    from .export import pack
    from .journal import read

    if not args.out.endswith(".safetensors"):
        raise ValueError(f"--out: expected a name that ends in .safetensors, got {args.out}")
    journal = Path(args.source) / "journal.jsonl" if Path(args.source).is_dir() else Path(args.source)
    size, generations = pack(journal, args.out), len(read(journal).records)
    print(f"{args.out}: {size / 1e3:.1f} kB, {generations} generations, {size / max(generations, 1):.0f} bytes each")


def _summary(trainer, pretraining: float) -> str:
    s, seconds = trainer.summary, dict(trainer.summary["seconds"])
    total = seconds.pop("total")
    lines = [f"after {s['generations']} generations, on {s['eval_prompts']} held-out prompts:"]
    for name, before in s["before"].items():
        if name.endswith("_se"):
            continue
        lines.append(f"  {name.removeprefix('eval_'):<10} {before:8.4f} -> {s['after'][name]:.4f}")
    shares = ", ".join(f"{phase} {t:.1f}" for phase, t in sorted(seconds.items(), key=lambda x: -x[1]) if t >= 0.05)
    lines.append(
        f"seconds: {total:.1f} ({shares})" + (f"; making the base model {pretraining:.1f}" * bool(pretraining))
    )
    lines.append(f"tuned model: {trainer.folder.model}; curves: {trainer.folder.path / 'curves.png'}")
    return "\n".join(lines)


def _evaluate(args: argparse.Namespace) -> None:
    from .evaluation import against, respond, summarize, table
    from .run_folder import write_whole
    from .run_options import FIELDS, run_options

    if args.samples < 1:
        raise ValueError(f"samples: expected at least 1, got {args.samples}")
    settings = {name: getattr(args, name) for name in FIELDS if hasattr(args, name)}
    results, everything, first = [], [], None
    for path in args.models or [None]:
        run = run_options({**settings, "model": path})
        task = _task(run)
        settings |= {"task": run.task, "style": run.style}  # the first model's, so that all are asked the same
        rows = task.eval_rows(args.samples)
        if not rows:
            raise ValueError(f"no problems of {run.data or run.task} are held out")
        model, tokenizer = _load(run)
        length = args.max_completion_length or task.max_new_tokens
        responses = respond(model, tokenizer, task, rows, length, args.batch_size)
        results.append(summarize(path or "embedded", task, responses))
        if first is None:
            first = responses
        else:
            results[-1] |= against(first, responses)
        everything += [{"model": results[-1]["model"], **response} for response in responses]
        del model
    if args.save:
        write_whole(args.save, "".join(json.dumps(line) + "\n" for line in everything))
    if args.json:
        print(json.dumps(results[0] if len(results) == 1 else results))
    else:
        print(table(results))


def _info(args: argparse.Namespace) -> None:
    import platform

    import torch
    import transformers

    from . import NOISE_VERSION, __version__, cuda_backend
    from .ops import auto_backend, backend_report

    print(f"esfast {__version__}, noise version {NOISE_VERSION}")
    print(f"python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}")
    try:
        from . import _cpu

        openmp = "OpenMP" if _cpu.OPENMP else "no OpenMP: one thread"
        sets = _cpu.instruction_sets()
        print(f"cpu extension: uses {sets[0]} (has {', '.join(sets)}), {torch.get_num_threads()} threads, {openmp}")
    except ImportError:
        print("cpu extension: not built")
    print(f"cuda extension: {cuda_backend.build()}")
    print(
        "on GPUs auto takes cuda before triton: fewer instructions a weight (esfast bench sass); not timed on one yet"
    )
    devices = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    for device in devices:
        name = torch.cuda.get_device_name(device) if device != "cpu" else platform.processor() or platform.machine()
        print(f'{device} ({name}): backend="auto" takes {auto_backend(torch.device(device))!r}')
        for backend, state in backend_report(device).items():
            print(f"  {backend:<10} {state}")


def _task(run: RunOptions):
    """The task; fills in what the options leave to the model: its task, and the style of its prompts."""
    from . import embedded, tasks

    if run.model is None:
        run.task, run.style = run.task or "countdown", run.style or embedded.STYLE
    elif run.task is None or run.style is None:
        from transformers import AutoConfig

        made = AutoConfig.from_pretrained(run.model)
        run.task = run.task or getattr(made, "prompt_task", "countdown")
        run.style = run.style or getattr(made, "prompt_style", "paper")
    return tasks.get(run.task, run.style, run.data, run.train_prompts, run.reward or ())


def _device(args: argparse.Namespace) -> str:
    import torch

    from .ops import auto_backend

    if args.device != "auto":
        return args.device
    ready = torch.cuda.is_available() and auto_backend(torch.device("cuda")) != "reference"
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if ready else "cpu"


def _load(args: argparse.Namespace | RunOptions, team: Team | None = None):
    """Model and tokenizer, on the device; of a model that processes of the team hold together, this one's part."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    from . import embedded
    from .rollout import is_small

    disable_progress_bar()  # the bars of loading and saving would tear that of the training
    path = args.model if args.model is not None else embedded.cached(task=args.task)
    dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    if team is not None and team.shards > 1:
        from .tensor_parallel import shard

        shard(model, team.mesh(_device(args)), _device(args))
    else:
        model.to(_device(args))
    if is_small(model):
        torch.set_num_threads(1)  # for perturbing it, too
    return model, AutoTokenizer.from_pretrained(path)
