"""The command line: esfast train | eval | replay | export | info | bench. Heavy imports happen inside the commands."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import os
import sys
import time


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0 done, 1 failed, 2 unusable arguments, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    logging.basicConfig(format="esfast: %(message)s", level=logging.WARNING)
    if argv[:1] == ["bench"]:  # benchmarks have parsers of their own
        from .bench import main as bench

        return bench(argv[1:])
    parser = _parser(full=argv[:1] == ["train"])
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
        prog="esfast", description="Full-parameter evolution-strategies fine-tuning of language models."
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train",
        help="fine-tune a model",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Fine-tunes all weights of a causal language model and leaves a run folder: config.yaml,\n"
        "metrics.jsonl, journal.jsonl, summary.json, curves.png and model/ (a Hugging Face folder).",
        epilog="examples:\n"
        "  esfast train                                  the embedded small model, minutes on a CPU\n"
        "  esfast train --model Qwen/Qwen2.5-0.5B-Instruct --task countdown --out runs/qwen\n"
        "  esfast train --model FOLDER --population-size 16 --sigma 0.002",
    )
    _add_model_arguments(train)
    engines = train.add_argument_group("engines")
    engines.add_argument("--engine", choices=("transformers", "vllm"), default="transformers",
                         help="what generates; vllm: in processes that Ray starts, which hold the weights (default: "
                         "transformers, in this process)")  # fmt: skip
    engines.add_argument("--num-engines", type=int, default=1, help="vLLM engines (default: 1)")
    engines.add_argument("--tensor-parallel-size", type=int, default=1, help="GPUs of each (default: 1)")
    if full:
        _add_config_arguments(train)
    train.set_defaults(run=_train)

    evaluate = commands.add_parser("eval", help="accuracy of a model on a task's held-out problems")
    _add_model_arguments(evaluate)
    evaluate.add_argument("--samples", type=int, default=500, help="held-out problems (default: 500)")
    evaluate.add_argument("--max-completion-length", type=int, help="longest response, in tokens (default: the task's)")
    evaluate.add_argument("--batch-size", type=int, help="most prompts generated at once (default: 64)")
    evaluate.add_argument("--json", action="store_true", help="print the result as JSON")
    evaluate.set_defaults(run=_evaluate)

    replay = commands.add_parser(
        "replay",
        help="the tuned model again, from the base model and a journal",
        description="Makes a tuned model from the base model and the journal of a run, or what `esfast export` made "
        "of it: the same bits as the run's, on a GPU or a CPU. Fingerprints are compared before and after.",
    )
    replay.add_argument("journal", help="journal.jsonl of a run folder, or an exported .safetensors file")
    replay.add_argument("--base", help="Hugging Face name or folder of the base model (default: the embedded model)")
    replay.add_argument("--task", default="countdown", help="of the embedded model (default: countdown)")
    replay.add_argument("--out", required=True, help="folder for the tuned model; must not exist")
    replay.add_argument("--until", type=int, help="generations to apply (default: all)")
    _add_placement_arguments(replay)
    replay.set_defaults(run=_replay)

    export = commands.add_parser(
        "export",
        help="a run's journal as one small safetensors file",
        description="Packs the journal of a run into one safetensors file, from which `esfast replay` makes the tuned "
        "model: a fine-tune of all weights in kilobytes.",
    )
    export.add_argument("run", metavar="RUN", help="run folder, or its journal.jsonl")
    export.add_argument("--out", required=True, help="file to write, ending in .safetensors")
    export.set_defaults(run=_export)

    info = commands.add_parser("info", help="versions, devices, and which backend runs and why")
    info.set_defaults(run=_info)

    commands.add_parser("bench", help="benchmarks: esfast bench NAME; see esfast bench --help", add_help=False)
    return parser


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model and task")
    group.add_argument("--model", help="Hugging Face name or folder (default: the embedded small model)")
    group.add_argument("--task", default="countdown", help="task (default: countdown)")
    group.add_argument("--style", choices=("paper", "compact"), help="prompts of the task (default: those that the "
                       "model was made with, compact for the embedded one; else paper)")  # fmt: skip
    _add_placement_arguments(group)


def _add_placement_arguments(parser) -> None:
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"),
                        help="dtype of the weights (default: the checkpoint's)")  # fmt: skip
    parser.add_argument("--device", default="auto", help="cpu, cuda:1, ... (default: what a backend is ready for; "
                        "under torchrun a GPU for each process)")  # fmt: skip


def _add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """One option for each field of ESConfig. Not given is not the same as default: tasks and the embedded model have
    defaults of their own."""
    from .trainer import ESConfig

    group = parser.add_argument_group("evolution strategies (defaults: the paper's; the embedded model has its own)")
    for f in dataclasses.fields(ESConfig):
        names = ["--out", "--output-dir"] if f.name == "output_dir" else ["--" + f.name.replace("_", "-")]
        text = f"{f.metadata['help']} (default: {f.default})" if f.default is not None else f.metadata["help"]
        options: dict = {"dest": f.name, "default": argparse.SUPPRESS, "help": text.replace("%", "%%")}
        if isinstance(f.default, bool):
            group.add_argument(*names, action=argparse.BooleanOptionalAction, **options)
        else:
            kind = int if f.default is None else type(f.default)
            group.add_argument(*names, type=kind, choices=f.metadata["choices"], **options)


def _train(args: argparse.Namespace) -> None:
    from . import embedded
    from .distributed import Team
    from .run_folder import RunFolder
    from .trainer import ESConfig, ESTrainer

    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(ESConfig) if hasattr(args, f.name)}
    if args.engine != "vllm" and (args.num_engines, args.tensor_parallel_size) != (1, 1):
        raise ValueError(
            "--num-engines and --tensor-parallel-size are those of --engine vllm; without it, use torchrun"
        )
    team = Team.join(_device(args))
    if args.engine == "vllm" and team.size > 1:
        raise ValueError("--engine vllm: one process trains, without torchrun; --num-engines says how many engines")
    if team.size > 1 and "output_dir" not in given:
        raise ValueError("--out: give the run folder: with several processes a restart must find it again")
    if "output_dir" in given and team.rank == 0:
        RunFolder.claim(given["output_dir"], given.get("resume", False) or team.restarted)  # before minutes of loading
    embedded_model = args.model is None
    task = _task(args)
    defaults = {
        "output_dir": f"runs/{task.name}-{time.strftime('%Y%m%d-%H%M%S')}",
        "max_completion_length": task.max_new_tokens,
        "reward_workers": 1,  # tasks' rewards are functions of a module, and of their arguments alone
        **task.settings,
        **(embedded.settings(task.name) if embedded_model else {}),
    }
    config = ESConfig(**{**defaults, **given})
    began = time.perf_counter()
    if embedded_model:  # one process makes it, the others find it
        team.tell("embedded model", lambda: str(embedded.cached(task=args.task)).encode())
    data = {
        "train_dataset": lambda generation, count: task.train_rows(generation, count, config.seed),
        "eval_dataset": task.eval_rows(config.eval_prompts),
        "metrics": {"accuracy": task.accuracy},
    }
    if args.engine == "vllm":
        from .integrations.fleet import FleetTrainer

        pretraining = 0.0
        path = args.model if args.model is not None else str(embedded.cached(task=args.task))
        trainer = FleetTrainer(
            path, list(task.reward_funcs), config, args.num_engines, args.tensor_parallel_size, args.dtype, **data
        )
    else:
        model, tokenizer = _load(args)
        pretraining = time.perf_counter() - began if embedded_model else 0.0
        trainer = ESTrainer(model, list(task.reward_funcs), config, processing_class=tokenizer, team=team, **data)
    if team.rank:
        trainer.train()
        return
    print(f"{trainer.es.plan!r}, {args.model or 'embedded model'} on {task.name} -> {config.output_dir}")
    try:
        trainer.train()
    finally:
        if trainer.summary:
            print(_summary(trainer, pretraining))


def _replay(args: argparse.Namespace) -> None:
    from pathlib import Path

    from .journal import replay
    from .plan import Plan
    from .run_folder import save_model

    if Path(args.out).exists():
        raise FileExistsError(f"--out: {args.out} exists already; choose another folder, or move it away")
    args.model = args.base
    model, tokenizer = _load(args)
    replay(Plan(model), args.journal, args.until)
    save_model(Path(args.out), model, tokenizer)
    print(f"tuned model: {args.out}")


def _export(args: argparse.Namespace) -> None:
    from pathlib import Path

    from .export import pack
    from .journal import read

    if not args.out.endswith(".safetensors"):
        raise ValueError(f"--out: expected a name that ends in .safetensors, got {args.out}")
    journal = Path(args.run) / "journal.jsonl" if Path(args.run).is_dir() else Path(args.run)
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
    from tqdm import tqdm

    from .rollout import TransformersEngine

    if args.samples < 1:
        raise ValueError(f"samples: expected at least 1, got {args.samples}")
    task = _task(args)
    rows = task.eval_rows(args.samples)
    model, tokenizer = _load(args)
    engine = TransformersEngine(model, tokenizer, args.max_completion_length or task.max_new_tokens, args.batch_size)
    prompts, chunk = [row["prompt"] for row in rows], args.batch_size or 64
    completions = []
    for start in tqdm(range(0, len(prompts), chunk), unit="batch", dynamic_ncols=True, leave=False):
        completions += engine.generate(prompts[start : start + chunk])
    columns = {key: [row[key] for row in rows] for key in rows[0]} | {"completions": completions}
    columns["prompts"] = columns.pop("prompt")
    correct = sum(task.accuracy(**columns))
    reward = sum(math.fsum(f(**columns)) for f in task.reward_funcs) / len(rows)
    accuracy = correct / len(rows)
    result = {
        "model": args.model or "embedded", "task": task.name, "samples": len(rows), "accuracy": accuracy,
        "standard_error": math.sqrt(accuracy * (1 - accuracy) / len(rows)), "reward": reward,
        "mean_length": sum(map(len, completions)) / len(rows),
    }  # fmt: skip
    if args.json:
        print(json.dumps(result))
    else:
        print("{task}, {samples} held-out problems: accuracy {accuracy:.4f} +- {standard_error:.4f}, "
              "reward {reward:.4f}, mean length {mean_length:.1f} characters".format(**result))  # fmt: skip


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


def _task(args: argparse.Namespace):
    from . import embedded, tasks

    if args.style is None and args.model is None:
        args.style = embedded.STYLE
    elif args.style is None:
        from transformers import AutoConfig

        args.style = getattr(AutoConfig.from_pretrained(args.model), "prompt_style", "paper")
    return tasks.get(args.task, style=args.style)


def _device(args: argparse.Namespace) -> str:
    import torch

    from .ops import auto_backend

    if args.device != "auto":
        return args.device
    ready = torch.cuda.is_available() and auto_backend(torch.device("cuda")) != "reference"
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if ready else "cpu"


def _load(args: argparse.Namespace):
    """Model and tokenizer, on the device."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    from . import embedded
    from .rollout import is_small

    disable_progress_bar()  # the bars of loading and saving would tear that of the training
    path = args.model if args.model is not None else embedded.cached(task=args.task)
    dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(_device(args))
    if is_small(model):
        torch.set_num_threads(1)  # for perturbing it, too
    return model, AutoTokenizer.from_pretrained(path)
