"""esfast eval."""

from __future__ import annotations

import argparse
import json

from ..evaluation import against, respond, summarize, table
from ..files import write_whole
from ..run_options import FIELDS, run_options
from .models import load, task_of


def run(args: argparse.Namespace) -> None:
    if args.samples < 1:
        raise ValueError(f"samples: expected at least 1, got {args.samples}")
    settings = {name: getattr(args, name) for name in FIELDS if hasattr(args, name)}
    results, everything, first = [], [], None
    for path in args.models or [None]:
        options = run_options({**settings, "model": path})
        task = task_of(options)
        settings |= {"task": options.task, "style": options.style}  # the first model's, so that all are asked the same
        rows = task.eval_rows(args.samples)
        if not rows:
            raise ValueError(f"no problems of {options.data or options.task} are held out")
        model, tokenizer = load(options)
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
