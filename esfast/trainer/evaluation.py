"""Evaluates models on a task: accuracy, reward and length of their responses to the same held-out prompts."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from ..rewards.scorer import Scorer, combine
from ..rollout import chat
from ..rollout.engine import TransformersEngine
from ..rollout.episodes.engine import Episodes, Settings
from ..tasks import Task
from ..utils.rows import Rows
from ..utils.stats import mean, standard_error
from .environment import episode_reward

CHUNK = 64  # prompts between two steps of the progress bar


def respond(
    model,
    tokenizer,
    task: Task,
    rows: Rows,
    max_new_tokens: int,
    batch_size: int | None,
    reward_weights: Sequence[float] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    episodes: Settings | None = None,
) -> list[dict]:
    """A dict for each row: its prompt, the completion, `reward` and, if the task can tell, `correct` (0.0 or 1.0).
    `episodes` says how those of an environment run."""
    engine = TransformersEngine(model, tokenizer, max_new_tokens, batch_size)
    engine.prompts.length_setting = "max_completion_length"
    if task.environment is not None:
        settings = episodes or Settings(template=chat_template_kwargs)
        with contextlib.closing(Episodes(task.environment, engine, tokenizer, settings)) as playing:
            return _episodes(playing, rows)
    prompts, completions, chunk = chat.render(rows, tokenizer, chat_template_kwargs), [], batch_size or CHUNK
    engine.check(prompts)
    for start in tqdm(range(0, len(prompts), chunk), unit="batch", dynamic_ncols=True, leave=False):
        completions += engine.generate(prompts[start : start + chunk])
    return judged(task, rows, prompts, completions, reward_weights)


def judged(
    task: Task,
    rows: Rows,
    prompts: Sequence[str],
    completions: Sequence[str],
    reward_weights: Sequence[float] | None = None,
) -> list[dict]:
    """What `respond` returns, for completions that are there."""
    weights = reward_weights or [1.0] * len(task.reward_funcs)
    functions = [*task.reward_funcs, *([] if task.accuracy is None else [task.accuracy])]
    values = Scorer(functions).submit(functions, *chat.answered(rows, completions)).result()
    scores = values[: len(task.reward_funcs)]
    responses = [
        {
            "prompt": prompt,
            "completion": completion,
            "reward": combine([[s[i]] for s in scores], weights)[0],
        }
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
    ]
    if task.accuracy is not None:
        for response, correct in zip(responses, values[-1], strict=True):
            response["correct"] = correct
    return responses


def _episodes(engine: Episodes, rows: Rows) -> list[dict]:
    """The same for an environment: `prompt` and `completion` are the first message and all that the model said. Raises
    RewardError for an episode that failed."""
    episodes = engine.generate(rows)
    rewards = episode_reward(None, episodes)
    return [{**episode.sample(), "reward": reward} for episode, reward in zip(episodes, rewards, strict=True)]


def summarize(model: str, task: Task, responses: Sequence[dict]) -> dict[str, Any]:
    """Means with their standard errors; lengths are in characters."""
    rewards = [r["reward"] for r in responses]
    turns = [float(r["turns"]) for r in responses if "turns" in r]
    result: dict[str, Any] = {"model": model, "task": task.name, "samples": len(responses)}
    if task.accuracy is not None:
        correct = [r["correct"] for r in responses]
        result |= {"accuracy": mean(correct), "standard_error": _error(correct)}
    return result | {
        "reward": mean(rewards),
        "reward_standard_error": _error(rewards),
        "mean_length": mean([len(r["completion"]) for r in responses]),
        **({"mean_turns": mean(turns)} if turns else {}),
    }


def against(first: Sequence[dict], other: Sequence[dict]) -> dict[str, float]:
    """The mean difference between two models' responses to the same prompts, `other` minus `first`, with its standard
    error. Since the prompts are the same, the error is smaller than with a sample of prompts for each model."""
    result: dict[str, float] = {}
    for key in ("correct", "reward"):
        if key in first[0]:
            differences = [b[key] - a[key] for a, b in zip(first, other, strict=True)]
            name = "accuracy" if key == "correct" else key
            result |= {f"{name}_difference": mean(differences), f"{name}_difference_error": _error(differences)}
    return result


def table(results: Sequence[dict[str, Any]]) -> str:
    """A text table of models side by side."""
    first = results[0]
    lines = [f"{first['task']}, {first['samples']} held-out prompts, mean +- standard error:"]
    width = max(len(r["model"]) for r in results)
    for r in results:
        figures = []
        for name, error in (("accuracy", "standard_error"), ("reward", "reward_standard_error")):
            if name in r:
                figures.append(f"{name} {r[name]:.4f} +- {r[error]:.4f}")
                if f"{name}_difference" in r:
                    figures[-1] += f" ({r[f'{name}_difference']:+.4f} +- {r[f'{name}_difference_error']:.4f})"
        figures.append(f"mean length {r['mean_length']:.1f} characters")
        figures += [f"mean turns {r['mean_turns']:.2f}"] if "mean_turns" in r else []
        lines.append(f"  {r['model']:<{width}}  " + ", ".join(figures))
    if len(results) > 1:
        lines.append(f"  (in parentheses: the difference from {first['model']}, prompt by prompt)")
    return "\n".join(lines)


def _error(values: Sequence[float]) -> float:
    return standard_error(values) if len(values) > 1 else 0.0
