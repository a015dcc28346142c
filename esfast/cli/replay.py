"""esfast replay."""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

from ..core.plan import Plan
from ..journal.journal import replay
from ..rollout import adapters
from ..trainer.run_folder import RunFolder, save_model
from ..utils.errors import BadValue, FileTaken
from ..utils.files import check_writable
from ..utils.unwrap import save_unwrapped
from .models import load


def run(args: argparse.Namespace) -> None:
    if Path(args.out).exists():
        raise FileTaken(f"--out: {args.out} exists already; choose another folder, or move it away")
    check_writable("--out", args.out, folder=True)
    args.model = args.base
    model, tokenizer = load(args)
    adapter = Path(args.adapter) if args.adapter else Path(args.journal).parent / "adapter"
    if args.adapter or adapter.is_dir():
        model = adapters.attach(model, adapter)
        found, mine = RunFolder(Path(args.journal).parent).read_identity(), adapters.identity(model)
        for name in found.keys() & mine.keys():
            if found[name] != mine[name]:
                raise BadValue(f"--base: the run had {name} of fingerprint {found[name]}, these have {mine[name]}")
    replay(Plan(model, args.include or adapters.patterns(model), args.exclude), args.journal, args.until)
    save_model(Path(args.out), functools.partial(save_unwrapped, model), tokenizer)
    print(f"tuned model: {args.out}")
