"""Evaluations during a run, on prompts that the model is not trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..rollout import chat
from ..rollout.engine import Engine
from ..rollout.sampling import LogitsError
from ..utils.rows import Rows
from ..utils.stats import mean
from .kl import KLToBase
from .run_folder import RunFolder

Judge = Callable[[Rows, Sequence], tuple[list[list[float | None]], dict[str, float]]]


class HeldOut:
    """Held-out prompts. `engine` answers them, `judge` scores the answers, and the first answers go to samples.jsonl.

    texts    turns rows into the texts that the engine gets
    judge    (rows, completions) -> each function's scores, and the figures to log: `rewards.scorer.judge`
    kl       the metric kl_to_base, or None
    samples  number of answers to keep
    """

    def __init__(
        self,
        texts: Callable[[Rows], list[str]],
        engine: Engine,
        judge: Judge,
        kl: KLToBase | None,
        folder: RunFolder,
        samples: int,
    ):
        self.kl = kl
        self._texts, self._engine, self._judge, self._folder, self._samples = texts, engine, judge, folder, samples

    def __call__(
        self, rows: Rows, generation: int, in_process_0: Callable[[Callable[[], dict]], dict]
    ) -> dict[str, float]:
        """The metrics of the model after this many generations, with `eval_` before their names, on rows of prompts and
        the columns that reward functions need. All processes that hold the model generate; `in_process_0` calls a
        function in process 0 and gives its result to all."""
        texts = self._texts(rows)
        try:
            completions = self._engine.generate(texts)
        except LogitsError:
            raise nonsense(f"the model after generation {generation}") from None
        # KL needs the model, so no other process can compute it.
        kl = {} if self.kl is None else {"kl_to_base": self.kl(texts, completions)}
        return in_process_0(lambda: self._score(rows, generation, texts, completions, kl))

    def _score(
        self, rows: Rows, generation: int, texts: list[str], completions: list[str], kl: dict[str, list]
    ) -> dict[str, Any]:
        scores, figures = self._judge(*chat.answered(rows, completions))
        for text, completion, *rewards in list(zip(texts, completions, *scores, strict=True))[: self._samples]:
            said = {"prompt": text, "completion": completion} if isinstance(completion, str) else completion.sample()
            self._folder.append_samples({"generation": generation, **said, "rewards": rewards})
        lengths = mean([len(c if isinstance(c, str) else c.text) for c in completions])
        return figures | {f"eval_{name}": mean(values) for name, values in kl.items()} | {"eval_length": lengths}


def nonsense(whose: str) -> LogitsError:
    return LogitsError(f"{whose} gives logits that are not numbers (NaN or infinite): lower sigma, or lr")
