"""Scores several members of a population in one batch.

A member's texts alone are a small batch, and each batch waits for its longest text. `PopulationEvaluator` writes the
weights of K members into stacked tensors (`stacked_model`), or the factors of low-rank noise (`low_rank_model`), gives
all of their prompts to the model in shared batches, and drops texts that have ended (`dropping`). With stacked tensors,
in float32 on one thread, the texts are those of one member after another.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Sequence

import torch

from ..core.dtensors import in_shards
from ..es.population import Member, Population
from ..utils.errors import BadValue
from ..utils.memory import total_memory
from .adapters import is_peft
from .completion import decoded
from .dropping import MEASURED_ROWS, Dropping, can_drop
from .engine import TransformersEngine, is_small
from .evaluator import SequentialEvaluator
from .low_rank_model import LowRankModel
from .probe import ALONE, ANY
from .sampling import LogitsError
from .stacked_model import StackedModel, Unsupported

log = logging.getLogger(__name__)

# Shares of the device's memory that "auto" gives to the weights of members and to their texts.
WEIGHTS_SHARE = TEXTS_SHARE = 0.25
# A batch of more rows takes longer for each of them on a CPU, whose caches it leaves.
MOST_ROWS_ON_CPU = 2048

Answers = Generator[tuple[Member, "list[str] | LogitsError"], None, None]


def asking(
    engine: TransformersEngine, members_at_once: int | str = "auto", noise: str = "gaussian"
) -> PopulationEvaluator | SequentialEvaluator:
    """The evaluator for `members_at_once`: "auto", or a number, also as text.

    "auto" asks several members at once where that was measured to be faster: on a CPU small models, and with low-rank
    noise all. ValueError for a number above 1 with decoding="static" or "continuous".
    """
    model = engine.model
    generates_plainly = engine.decoding in ("auto", "plain")
    if members_at_once == "auto":
        faster = is_small(model) or (noise == "low_rank" and model.device.type == "cpu")
        several = generates_plainly and faster and not in_shards(model)
        return PopulationEvaluator(engine) if several else SequentialEvaluator(engine)
    if int(members_at_once) == 1:
        return SequentialEvaluator(engine)
    if not generates_plainly:
        raise BadValue(
            f"members_at_once: several members generate with decoding='plain', not {engine.decoding!r}; leave decoding "
            "at 'auto', or members_at_once at 1"
        )
    return PopulationEvaluator(engine, int(members_at_once))


class PopulationEvaluator:
    """The MemberEvaluator that asks K members at once.

    engine           of the model that is trained; it also answers for evaluations
    members_at_once  K, or "auto": as many as have their weights in a quarter of the device's memory and at least one
                     prompt each in another quarter. Where members can't share the model, "auto" asks one after another

    Once the first population came, `at_once` is K, `need` the bytes that it takes at most, and `one_by_one` has the
    names of the modules that are called for one member after another, with `*` for numbers.
    """

    own_prompts = True

    def __init__(self, engine: TransformersEngine, members_at_once: int | str = "auto"):
        self.engine, self.members_at_once = engine, members_at_once
        self.at_once: int | None = None
        self.need = 0
        self.one_by_one: set[str] = set()
        self._tokens = self._bytes_of_member = self._bytes_to_write = self._bytes_to_check = 0
        self._stack: StackedModel | None = None
        self._way: Dropping | None = None
        self._bytes_of_row: dict[tuple[int, bool], int] = {}
        self._sequential = SequentialEvaluator(engine)

    @property
    def tokens(self) -> int:
        return self._tokens + self.engine.tokens

    def evaluate(self, members: Population, prompts: Sequence[str], seeds: Sequence[int] | None) -> Answers:
        """See MemberEvaluator. Raises Unsupported if members can't share the model and K is a number."""
        if self.at_once is None:
            self._settle(members, prompts, seeds is not None)
        if self.at_once == 1:
            yield from self._sequential.evaluate(members, prompts, seeds)
            return
        for packet in members.packets(self.at_once):
            yield from self._ask(members, packet, prompts, seeds)

    def close(self) -> None:
        self._stack = None
        self.engine.close()

    # ---- how many ----------------------------------------------------------------------------------------------------

    def _settle(self, members: Population, prompts: Sequence[str], sampled: bool) -> None:
        """Chooses K for the first population, and says so."""
        es, engine = members.es, self.engine
        processes = max(1, es.team.size // es.team.shards)
        # A trial has other members than a generation, which K is for.
        most = -(-max(len(members), es.population_size) // processes)
        asked = int(self.members_at_once) if self.members_at_once != "auto" else most
        try:
            self._check(members)
        except Unsupported as error:
            if self.members_at_once != "auto":
                raise
            log.info("members are asked one after another: %s", error)
            self.at_once = 1
            return
        except LogitsError:
            # Sigma breaks the members that it was tried out with. Asked one after another, each is named.
            self.at_once = 1
            return
        row = self._row_bytes(max(map(len, engine.prompts(prompts))), sampled)
        if self.members_at_once == "auto":
            memory = total_memory(es.plan.device)
            rows = engine.batch_size or int(TEXTS_SHARE * memory / row)
            asked = min(asked, int(WEIGHTS_SHARE * memory / max(1, self._bytes_of_member)), rows)
        self.at_once = max(1, min(asked, most))
        own = len(prompts[members.prompts_of(members.members[0])])
        rows = self.at_once * self._prompts_each(own, self.at_once, row)
        answering = self.at_once * self._bytes_of_member + self._bytes_to_write + rows * row
        self.need = max(answering, self._bytes_to_check)
        log.info(
            "members_at_once: %d of %d members answer together, %d rows at once; their weights and texts take %.2f GB",
            self.at_once,
            max(len(members), es.population_size),
            rows,
            self.need / 1e9,
        )

    def _check(self, members: Population) -> None:
        """Unsupported if members can't share the model; it is tried out with two."""
        es, engine = members.es, self.engine
        if is_peft(engine.model):
            raise Unsupported("a model with PEFT's adapters answers for one member at a time")
        if engine.traits is None or engine.traits.together == ALONE:
            raise Unsupported(
                f"a {type(engine.model).__name__} answers one prompt at a time"
                if engine.traits is not None
                else "the model is in shards"
            )
        if engine.traits.together != ANY and members.prompts_of(members.members[0]) != members.prompts_of(
            members.members[-1]
        ):
            raise Unsupported(
                f"a {type(engine.model).__name__} answers prompts of one length at a time, and members have prompts of "
                "their own"
            )
        stack = self._stack_of(es, 2)
        stack.write([(0, es.sigma), (1, es.sigma)])
        stack.check()
        self._bytes_of_member, self._bytes_to_write = stack.bytes_of_member, stack.bytes_to_write
        self._bytes_to_check = stack.nbytes + stack.bytes_to_check
        self._stack = None
        with engine.own_settings():
            room = can_drop(engine.model, engine.generation_config, room=True)
            drops = room or can_drop(engine.model, engine.generation_config)
        self.one_by_one = set(stack.learned.one_by_one)
        self._way = Dropping(engine.model, engine.generation_config, drops, room)

    def _stack_of(self, es, at_once: int) -> StackedModel:
        if self._stack is None or self._stack.at_once < at_once:
            self._stack = None
            kind = LowRankModel if es.rule.noise == "low_rank" else StackedModel
            self._stack = kind(es.plan, at_once, es.store.source_of_members, es.rule, es.perturb_rounding)
        return self._stack

    def _row_bytes(self, tokens: int, sampled: bool) -> int:
        """Bytes that a row of so many prompt tokens takes at most while its text is generated."""
        engine, way = self.engine, self._way
        if (tokens, sampled) not in self._bytes_of_row:
            with engine.own_settings():
                sampling = engine.begin_batch([0] * MEASURED_ROWS if sampled else None)
                found = way.row_bytes(tokens, sampling)
            traits = engine.traits
            if not way.room and traits.bytes_fixed is not None:
                # Appending a token to a cache copies it: of one layer there are two.
                longest = tokens + engine.max_new_tokens
                found = max(found, 2 * (traits.bytes_fixed + traits.bytes_per_token * longest))
            self._bytes_of_row[tokens, sampled] = found
        return self._bytes_of_row[tokens, sampled]

    def _prompts_each(self, prompts: int, members: int, row: int) -> int:
        """How many prompts of each of so many members are generated at once."""
        device = self.engine.model.device
        rows = self.engine.batch_size or int(TEXTS_SHARE * total_memory(device) / row)
        if device.type == "cpu":
            rows = min(rows, MOST_ROWS_ON_CPU)
        return max(1, min(prompts, rows // members))

    # ---- asking ------------------------------------------------------------------------------------------------------

    def _ask(
        self, members: Population, packet: list[Member], prompts: Sequence[str], seeds: Sequence[int] | None
    ) -> Answers:
        while packet:
            some, packet = packet[: self.at_once], packet[self.at_once :]
            stack = self._stack_of(members.es, self.at_once)
            stack.write([(member.seed, member.sign * members.sigma) for member in some])
            members.on_placed()
            own = [members.prompts_of(member) for member in some]
            try:
                own_seeds = None if seeds is None else [seeds[o] for o in own]
                answers = self._answers(stack, [prompts[o] for o in own], own_seeds)
            except torch.OutOfMemoryError:
                if len(some) == 1:
                    raise
                answers = None
            if answers is None:  # outside the except block, whose traceback keeps the failed batch's tensors alive
                self._stack = stack = None
                self.at_once, packet = -(-len(some) // 2), some + packet
                log.warning("out of memory with %d members at once: going on with %d", len(some), self.at_once)
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                continue
            yield from zip(some, answers, strict=True)

    def _answers(
        self, stack: StackedModel, prompts: Sequence[Sequence[str]], seeds: Sequence[Sequence[int]] | None
    ) -> list[list[str] | LogitsError]:
        """Of each of the members that were written, to its prompts; all have equally many."""
        engine, count, most = self.engine, len(prompts), len(prompts[0])
        encoded = engine.prompts([prompt for own in prompts for prompt in own])
        lengths = list(map(len, encoded))
        # of each member, numbers of its prompts among all, the longest first
        order = [sorted(range(k * most, (k + 1) * most), key=lambda i: -lengths[i]) for k in range(count)]
        flat = None if seeds is None else [seed for of_member in seeds for seed in of_member]
        texts = [""] * len(encoded)
        fine = [True] * count
        each = self._prompts_each(most, count, self._row_bytes(max(lengths), seeds is not None))
        with engine.own_settings(), stack.in_place():
            done = 0
            while done < most:
                step = engine.traits.batchable([lengths[i] for i in order[0][done : done + each]])
                batch = [i for own in order for i in own[done : done + step]]
                own_seeds = None if flat is None else [flat[i] for i in batch]
                new, numbers = self._generate([encoded[i] for i in batch], count, own_seeds)
                for i, text in zip(batch, decoded(engine.tokenizer, new), strict=True):
                    texts[i] = text
                fine = [a and b for a, b in zip(fine, numbers, strict=True)]
                self._tokens += sum(map(len, new))
                done += step
        bad = LogitsError("the model's logits are NaN or infinite")
        return [texts[k * most : (k + 1) * most] if fine[k] else bad for k in range(count)]

    def _generate(self, rows: list[list[int]], count: int, seeds: Sequence[int] | None):
        return self._way(rows, count, self.engine.begin_batch(seeds))
