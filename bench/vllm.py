"""`esfast bench vllm`: a population in one vLLM engine, beside member after member and beside frozen weights.

    one by one   perturb_self_weights, generate, esfast_restore, for each member
    at once      esfast_members, and all members' prompts in one call, each with its member's LoRA adapter
    frozen       the same prompts in one call, of the weights as they are

All three in one engine and one process, in turn. No token ends a text, so that all generate equally many tokens. On a
CPU seconds are those that the process computed; on a GPU those that passed. Members are the same both times: what LoRA
slots do not carry is frozen, and texts of float32 weights must be the same.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median

from ..integrations.vllm_engine import EXTENSION
from ..integrations.vllm_members import lora_options
from ..update.updater import Group, Rule
from . import BenchmarkError, count
from .noise import note

# (members, prompts of each, rank)
CASES = [(16, 4, 1), (32, 2, 1)]
# The least that the gain and the most that the overhead may be, by members and prompts, for a row of the usual model.
LIMITS = {(16, 4): (2.5, 1.25), (32, 2): (2.5, 1.5)}
SIGMA = 0.01
# Of 100 texts of float32 weights so many must be the same; sums in another order may decide between equal tokens.
SAME = 97
USUAL = "random, 24.6M"

Table = tuple[list[str], list[list[str]]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="FOLDER", help="a model's name or folder (default: a random one, 24.6e6)")
    for name, text in (("members", "of the only row then"), ("prompts", "of each member"), ("rank", "of the noise")):
        parser.add_argument(f"--{name}", type=count, help=f"{text} (default: two rows)")
    parser.add_argument("--new-tokens", type=count, default=32, help="tokens of a text (default: 32)")
    parser.add_argument("--prompt-tokens", type=count, default=16, help="tokens of a prompt (default: 16)")
    parser.add_argument("--slots", type=count, help="max_loras (default: the number of members)")
    parser.add_argument("--dtype", default="float32", help="of the weights (default: float32)")
    parser.add_argument("--repeats", type=count, default=3, help="rounds of each row (default: 3)")


def run(args: argparse.Namespace) -> dict:
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    for name, usual in (("VLLM_CPU_KVCACHE_SPACE", "1"), ("VLLM_CPU_OMP_THREADS_BIND", "nobind")):
        os.environ.setdefault(name, usual)
    try:
        import vllm
    except ImportError:
        raise BenchmarkError(
            "esfast bench vllm needs vLLM: pip install 'esfast[vllm]', or `make .venv-vllm/installed`"
        ) from None
    given = (args.members, args.prompts, args.rank)
    cases = CASES
    if any(given):
        cases = [tuple(n if n is not None else usual for n, usual in zip(given, CASES[0], strict=True))]
    rows: list[dict] = []
    with _model(args.model) as folder:
        for members, prompts, rank in cases:
            note(f"{args.model or USUAL}, {members} members x {prompts} prompts, rank {rank}")
            rows.append(measure(folder, members, prompts, rank, args) | {"model": args.model or USUAL})
            args.save({"rows": rows, "vllm": vllm.__version__})
    return {"rows": rows, "vllm": vllm.__version__}


@contextmanager
def _model(given: str | None) -> Iterator[str]:
    """The model's folder; without one, that of a random Qwen2."""
    if given is not None:
        yield given
        return
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from ..tasks import embedded

    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        config = Qwen2Config(
            vocab_size=4096,
            hidden_size=512,
            intermediate_size=1408,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            initializer_range=0.05,
            bos_token_id=0,
            eos_token_id=1,
        )
        for part in (Qwen2ForCausalLM(config), embedded.make_tokenizer()):
            part.save_pretrained(folder)
        yield folder


def measure(folder: str, members: int, prompts: int, rank: int, args: argparse.Namespace) -> dict:
    """A row of figures, of an engine that is made for it."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    slots = args.slots or members
    llm = LLM(
        folder,
        dtype=args.dtype,
        worker_extension_cls=EXTENSION,
        max_num_seqs=max(8, members * prompts),
        max_model_len=args.prompt_tokens + args.new_tokens + 16,
        enforce_eager=args.model is None,
        disable_log_stats=True,
        enable_prefix_caching=False,
        **lora_options(rank, slots),
    )
    try:
        device = llm.llm_engine.vllm_config.device_config.device_type
        same, rounds = _rounds(llm, device, members, prompts, rank, args)
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
    if args.dtype == "float32" and same < SAME:
        raise BenchmarkError(f"only {same:.0f} % of the texts are the same in both ways. No figures are given")
    seconds = {name: median(values) for name, values in rounds.items()}
    gain, overhead = seconds["one by one"] / seconds["at once"], seconds["at once"] / seconds["frozen"]
    least, most = LIMITS.get((members, prompts), (0.0, float("inf")))
    limited = args.model is None and rank == 1 and device == "cpu"
    return {
        "device": device,
        "dtype": args.dtype,
        "members": members,
        "prompts": prompts,
        "rank": rank,
        "slots": slots,
        "new_tokens": args.new_tokens,
        "same_texts_percent": same,
        "seconds": seconds,
        "all_seconds": rounds,
        "times_as_fast": gain,
        "overhead_ratio": overhead,
        "pass": not limited or (gain >= least and overhead <= most),
    }


def _rounds(
    llm, device: str, members: int, prompts: int, rank: int, args: argparse.Namespace
) -> tuple[float, dict[str, list[float]]]:
    """Which percentage of the texts is the same in both ways, and the seconds of each contender's rounds."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    clock = time.process_time if device == "cpu" else time.perf_counter
    settings = SamplingParams(temperature=0, max_tokens=args.new_tokens, ignore_eos=True)
    rows = [
        {"prompt_token_ids": [(17 * i + 31 * p) % 900 + 2 for i in range(args.prompt_tokens)]} for p in range(prompts)
    ]
    seeds = list(range(members))

    def call(method: str, *arguments):
        return llm.collective_rpc(method, args=arguments)[0]

    def ask(asked: list, adapters: list | None = None) -> list[list[int]]:
        done = llm.generate(asked, settings, use_tqdm=False, lora_request=adapters)
        return [list(d.outputs[0].token_ids) for d in done]

    def one_by_one() -> list[list[int]]:
        found = []
        for seed in seeds:
            call("perturb_self_weights", seed, SIGMA)
            found += ask(rows)
            call("esfast_restore")
        return found

    def at_once() -> list[list[int]]:
        given = [LoRARequest(**fields) for fields in call("esfast_members", seeds, [SIGMA] * members)]
        return ask(rows * members, [adapter for adapter in given for _ in rows])

    frozen = tuple(Group.parse(text) for text in call("esfast_adapters")["frozen"])
    call("esfast_begin", Rule(noise="low_rank", rank=rank, groups=frozen).to_json())
    contenders: dict[str, Callable[[], list]] = {
        "one by one": one_by_one,
        "at once": at_once,
        "frozen": lambda: ask(rows * members),
    }
    # The first round loads and compiles what is needed.
    texts = {name: work() for name, work in contenders.items()}
    pairs = list(zip(texts["one by one"], texts["at once"], strict=True))
    rounds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(args.repeats):
        for name, work in contenders.items():
            began = clock()
            work()
            rounds[name].append(clock() - began)
    return 100 * sum(a == b for a, b in pairs) / len(pairs), rounds


def table(result: dict) -> Table:
    headers = [
        "model, device",
        "members x prompts, rank",
        "one after another, s",
        "at once, s",
        "times as fast",
        "frozen weights, s",
        "at once over frozen",
        "same texts",
    ]
    lines = []
    for r in result["rows"]:
        s = r["seconds"]
        lines.append(
            [
                f"{r['model']}, {r['device']}",
                f"{r['members']} x {r['prompts']}, {r['rank']}",
                f"{s['one by one']:.3g}",
                f"{s['at once']:.3g}",
                f"{r['times_as_fast']:.2f}",
                f"{s['frozen']:.3g}",
                f"{r['overhead_ratio']:.2f}",
                f"{r['same_texts_percent']:.0f} %",
            ]
        )
    return headers, lines
