"""esfast eval."""

from __future__ import annotations

import argparse
import functools
import json
import logging
from typing import Any

from ..rollout import chat
from ..rollout.encoding import PromptEncoder, context_limit
from ..trainer.environment import settings_of
from ..trainer.evaluation import against, respond, summarize, table
from ..utils.errors import BadValue
from ..utils.files import check_writable, write_whole
from ..utils.settings import check_int
from .earlier_run import asked_of, model_in, run_of
from .members import ask_members
from .models import load, task_of
from .options import as_flag
from .parser import EVAL_SETTINGS
from .run_options import es_config, run_options

log = logging.getLogger(__name__)


def run(args: argparse.Namespace) -> None:
    check_int("--samples", args.samples, 1, 2**31)
    for name, value in (("max_completion_length", args.max_completion_length), ("batch_size", args.batch_size)):
        if value is not None:
            check_int(as_flag(name), value, 1, 2**31)
    if args.save:
        check_writable("--save", args.save)
    args.models = [*args.runs, *(args.models or ())]
    if args.members is not None:
        check_int("--members", args.members, 1, 2**31)
        if len(args.models) != 1 or run_of(args.models[0]) is None:
            raise BadValue("--members: name one run folder, whose members are asked")
    settings = _settings(args)
    results, everything, first = [], [], None
    for path in args.models or [None]:
        options = run_options({**settings, "model": path and model_in(path)})
        task = task_of(options)
        # The first model decides, so that all models get the same prompts.
        settings |= {"task": options.task, "style": options.style}
        if task.environment is not None and args.members not in (None, 1):
            raise BadValue("--members: episodes can't be put to a vote; --members 1 asks the best member")
        rows = task.eval_rows(args.samples)
        if not rows:
            raise BadValue(f"no problems of {options.data or options.task} are held out")
        model, tokenizer = load(options)
        length = args.max_completion_length
        if length is None and task.environment is not None:
            length = settings.get("max_completion_length") or task.max_new_tokens
        elif length is None:
            prompts = PromptEncoder(tokenizer)(chat.render(rows, tokenizer, settings.get("chat_template_kwargs")))
            length = _that_fits(
                settings.get("max_completion_length") or task.max_new_tokens,
                max(map(len, prompts)),
                context_limit(model),
            )
        further = {name: settings.get(name) for name in ("reward_weights", "chat_template_kwargs")}
        further["episodes"] = settings_of(es_config(settings)) if task.environment is not None else None
        responses = respond(model, tokenizer, task, rows, length, args.batch_size, **further)
        results.append(summarize(path or "embedded", task, responses))
        if first is None:
            first = responses
        else:
            results[-1] |= against(first, responses)
        everything += [{"model": results[-1]["model"], **response} for response in responses]
        del model
        if args.members is not None:
            ask = functools.partial(respond, **further)
            for name, responses in ask_members(run_of(path), args, task, rows, length, ask, settings):
                results.append(summarize(name, task, responses) | against(first, responses))
                everything += [{"model": name, **response} for response in responses]
    if args.save:
        write_whole(args.save, "".join(json.dumps(line) + "\n" for line in everything))
    if args.json:
        print(json.dumps(results[0] if len(results) == 1 else results))
    else:
        print(table(results))


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """The given settings, completed by those of the first model that lies in a run folder."""
    given = {name: getattr(args, name) for name in EVAL_SETTINGS if hasattr(args, name)}
    if given.get("environment") is not None:
        # An environment is a task, which a run may have been trained on.
        given["task"] = run_options(given).task
        del given["environment"]
    runs = [run for path in args.models or () if (run := run_of(path)) is not None]
    settings = asked_of(runs[0], given) if runs else given
    others = [run for run in runs[1:] if asked_of(run, given).get("task") != settings.get("task")]
    if others:
        log.warning("all are asked what %s was trained on, which is not what %s was", runs[0], others[0])
    return settings


def _that_fits(length: int, longest: int, limit: int | None) -> int:
    """`length`, or if the context of `limit` tokens has no room for it after the longest prompt, the room that there
    is; then with a warning."""
    if limit is None or longest + length <= limit or longest >= limit:
        return length
    log.warning(
        "responses may have %d tokens, not %d: the model's context is %d, the longest prompt has %d "
        "(--max-completion-length sets it)",
        limit - longest,
        length,
        limit,
        longest,
    )
    return limit - longest
