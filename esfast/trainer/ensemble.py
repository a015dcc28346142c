"""The best members of a run's last generation, alone and by vote: models that a run has scored anyway.

Random perturbations of a model, chosen by their reward and combined by a majority vote, are a baseline for what an
update makes of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..core.plan import Plan
from ..es.population import Member, member_seed
from ..es.weights import open_store
from ..journal.journal import read, replay
from ..tasks.tags import last_answer
from ..update.updater import Rule
from ..utils.errors import BadValue


class LastGeneration:
    """The members of the last generation of a run, the best first. It holds the run's weights of before the last
    update.

        last = LastGeneration(plan, journal, mirrored)
        last.ask(3, respond)              # what the best three say, one after another in the model of `plan`

    plan     the base weights; they become those that the last generation began with
    mirrored whether members came in pairs

    Raises ValueError for a journal without generations, of another model, or as `journal.replay` does. With
    weights="master" members are made from rounded weights, which may differ from the run's in the last bit.
    """

    def __init__(self, plan: Plan, path: Path, mirrored: bool, perturb_rounding: str = "nearest"):
        header, records, _ = read(path)
        if not records:
            raise BadValue(f"--members: the run of {path} has no generation yet")
        record = records[-1]
        self.members = [
            Member(i, member_seed(header["seed"], record.generation, i // 2 if mirrored else i), _sign(i, mirrored), r)
            for i, r in enumerate(record.rewards)
            if r is not None
        ]
        if set(record.seeds) != {m.seed for m in self.members}:
            raise BadValue(f"--members: the members of {path} are not those of its settings (mirrored: {mirrored})")
        self.members.sort(key=lambda m: (-(m.reward or 0.0), m.index))
        replay(plan, path, until=len(records) - 1)
        self._store = open_store(plan, Rule.from_json(header), "base", "auto")
        self.generation, self._sigma, self._rounding = record.generation + 1, record.sigma, perturb_rounding

    def ask(self, count: int, respond: Callable[[], Any]) -> list[Any]:
        """`respond()` of each of the best `count` members, which is then the model. ValueError if there are fewer."""
        if count > len(self.members):
            raise BadValue(f"--members: the last generation has {len(self.members)} members, asked for are {count}")
        found = []
        try:
            for member in self.members[:count]:
                self._store.perturb(member.seed, member.sign * self._sigma, self._rounding)
                found.append(respond())
        finally:
            self._store.restore()
        return found


def vote(completions: Sequence[Sequence[str]]) -> list[str]:
    """Of several models' completions, the best model's first, for each prompt the one whose answer most of them give;
    of answers with as many votes, that of the best model. An answer is the text in the last answer tags, or without
    tags the whole completion; white space around it is ignored. One with tags outvotes those without."""
    chosen = []
    for texts in zip(*completions, strict=True):
        answers = [last_answer(text) for text in texts]
        tagged = [i for i, answer in enumerate(answers) if answer is not None] or list(range(len(texts)))
        keys = {i: (answers[i] or texts[i]).strip() for i in tagged}
        votes = Counter(keys.values())
        most = max(votes.values())
        chosen.append(texts[next(i for i in tagged if votes[keys[i]] == most)])
    return chosen


def _sign(index: int, mirrored: bool) -> int:
    return 1 - 2 * (index % 2) if mirrored else 1
