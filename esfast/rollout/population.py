"""Scores several members of a population in one batch.

A member's texts alone are a small batch, and each batch waits for its longest text. `PopulationEvaluator` writes the
weights of K members into stacked tensors (`stacked_model`), or the factors of low-rank noise (`low_rank_model`), gives
all of their prompts to the model in shared batches (`shared_batches`), and drops texts that have ended (`dropping`).
With stacked tensors, in float32 on one thread, the texts are those of one member after another.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Generator, Iterator, Sequence

import torch

from ..core.dtensors import in_shards
from ..es.population import Member, Population
from ..utils.errors import BadValue
from ..utils.memory import give_back_freed_memory, in_bytes, keep_freed_memory, out_of_memory, own_memory
from .adapters import is_peft
from .completion import OWN, Asked, Complete, Completion
from .dropping import Dropping, can_drop
from .engine import TransformersEngine, is_small
from .evaluator import SequentialEvaluator
from .low_rank_model import LowRankModel
from .probe import ALONE
from .sampling import LogitsError
from .shared_batches import TEXTS_SHARE, SharedBatches
from .stacked_model import StackedModel, Unsupported
from .static_steps import StaticSteps, on_one_device
from .threads import Threads

log = logging.getLogger(__name__)

# Share of the device's memory that "auto" gives to the weights of members; their texts get TEXTS_SHARE.
WEIGHTS_SHARE = 0.25
# Where weights and texts take less than this share, time counts for more than memory.
LITTLE = 1 / 64

Answers = Generator[tuple[Member, "list[str] | LogitsError"], None, None]


def asking(
    engine: TransformersEngine, members_at_once: int | str = "auto", noise: str = "gaussian"
) -> PopulationEvaluator | SequentialEvaluator:
    """The evaluator for `members_at_once`: "auto", or a number, also as text.

    "auto" asks several members at once where that was measured to be faster: on one GPU that runs CUDA (or ROCm), and
    on a CPU small models, and with low-rank noise all. ValueError for a number above 1 with decoding="continuous".
    """
    model = engine.model
    if members_at_once == "auto":
        kind = model.device.type
        if kind == "cuda":
            faster = engine.decoding != "continuous" and on_one_device(model)
        else:
            faster = engine.decoding in ("auto", "plain") and (is_small(model) or (noise, kind) == ("low_rank", "cpu"))
        return PopulationEvaluator(engine) if faster and not in_shards(model) else SequentialEvaluator(engine)
    if int(members_at_once) == 1:
        return SequentialEvaluator(engine)
    if engine.decoding == "continuous":
        raise BadValue(
            "members_at_once: several members generate with decoding='plain' or 'static', not 'continuous'; leave "
            "decoding at 'auto', or members_at_once at 1"
        )
    return PopulationEvaluator(engine, int(members_at_once))


class PopulationEvaluator:
    """The MemberEvaluator that asks K members at once.

    engine           of the model that is trained; it also answers for evaluations
    members_at_once  K, or "auto": as many as have their weights in a quarter of the device's memory and at least one
                     prompt each in another quarter. Where members can't share the model, "auto" asks one after another

    Once the first population came, `at_once` is K, `need` the bytes that it takes at most, with prompts that are no
    longer than those of the first population, `beside_tensors` the part of them that is not of tensors, and
    `one_by_one` has the names of the modules that are called for one member after another, with `*` for numbers.
    """

    own_prompts = True

    def __init__(self, engine: TransformersEngine, members_at_once: int | str = "auto"):
        self.engine, self.members_at_once = engine, members_at_once
        self.at_once: int | None = None
        self.need = self.beside_tensors = 0
        self.one_by_one: set[str] = set()
        self.batches: SharedBatches | None = None
        self._bytes_of_member = self._bytes_to_write = self._bytes_to_check = self._workspaces = 0
        self._stack: StackedModel | None = None
        self._plain: Dropping | None = None
        self._processes = 1
        self._sequential = SequentialEvaluator(engine)

    @property
    def tokens(self) -> int:
        return self.engine.tokens + (0 if self.batches is None else self.batches.tokens)

    def evaluate(self, members: Population, prompts: Sequence[str], seeds: Sequence[int] | None) -> Answers:
        """See MemberEvaluator. Raises Unsupported if members can't share the model and K is a number."""
        own = len(prompts[members.prompts_of(members.members[0])])
        self._settle(members, seeds is not None, own, prompts)
        if self.at_once == 1:
            yield from self._sequential.evaluate(members, prompts, seeds)
            return
        for packet in members.packets(self.at_once):
            yield from self._ask(members, packet, prompts, seeds)

    def placed(self, members: Population, sampled: bool) -> Iterator[tuple[list[Member], Complete]]:
        """Yields members while they are in place, up to K in a list, and how their texts are completed: each text has
        the number of its member in the list. For those who ask members many times; `sampled` says whether there are
        seeds. Raises Unsupported as `evaluate`."""
        self._settle(members, sampled)
        if self.at_once == 1:
            yield from self._sequential.placed(members, sampled)
            return
        for packet in members.packets(self.at_once):
            for some, stack in self._written(members, packet):
                yield some, functools.partial(self._complete, stack)

    def close(self) -> None:
        self._free()
        self.engine.close()

    def _free(self) -> None:
        """Frees the members' weights, and the graphs that read them."""
        self._stack = None
        if self.batches is not None:
            self.batches.way.close()

    # ---- how many ----------------------------------------------------------------------------------------------------

    def _settle(self, members: Population, sampled: bool, own: int = 1, prompts: Sequence[str] | None = None) -> None:
        """Chooses K for the first population, and says so. `own` is the number of prompts of a member. If the prompts
        are not known yet, texts may take all of their share of the memory."""
        if self.at_once is not None:
            return
        self._processes = max(1, members.es.team.size // members.es.team.shards)
        longest = None if prompts is None else max(map(len, self.engine.prompts(prompts)))
        most_rows = self._try_out(members, longest, sampled)
        self.at_once = 1 if most_rows is None else self._choose(members, most_rows, own)
        if self.at_once > 1:
            self._tell(members, sampled, own, longest)

    def _try_out(self, members: Population, longest: int | None, sampled: bool) -> float | None:
        """How many rows fit, if each is of another member; None: members are to be asked one after another. Raises
        Unsupported if they can't share the model and K is a number."""
        try:
            self._check(members)
            return math.inf if longest is None else self.batches.room(longest, sampled)
        except Unsupported as error:
            if self.members_at_once != "auto":
                raise
            log.info("members are asked one after another: %s", error)
            return None
        except LogitsError:
            # Sigma breaks the members that it was tried out with. Asked one after another, each is named.
            return None
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
        # outside the except block, whose traceback keeps the tensors of the trial alive
        self._free()
        _free_memory()
        log.warning("out of memory when two members were tried out together: members are asked one after another")
        return None

    def _choose(self, members: Population, most_rows: float, own: int) -> int:
        """K."""
        # A trial has other members than a generation, which K is for.
        most = -(-max(len(members), members.es.population_size) // self._processes)
        if self.members_at_once != "auto":
            return max(1, min(int(self.members_at_once), most))
        memory = own_memory(members.es.plan.device)
        fitting = int((WEIGHTS_SHARE * memory - self._bytes_to_write) / max(1, self._bytes_of_member))
        rows = int(min(most_rows, most * own))
        if min(fitting, rows) < 2:
            log.info(
                "members are asked one after another: the share of the memory for several at once, 2 times %s, "
                "holds the weights of %d or the texts of %d",
                in_bytes(WEIGHTS_SHARE * memory),
                max(0, fitting),
                rows,
            )
        return max(1, min(most, fitting, rows))

    def _tell(self, members: Population, sampled: bool, own: int, longest: int | None) -> None:
        """Says what K members take. If it is little of the memory, freed memory is kept from now on, else it is given
        back."""
        memory, at_once, batches = own_memory(members.es.plan.device), self.at_once, self.batches
        weights = at_once * self._bytes_of_member + self._bytes_to_write
        texts, transient, told = int(TEXTS_SHARE * memory), 0, "at most"
        if longest is not None:
            room = batches.room(longest, sampled, members=at_once)
            rows = min(at_once, room) * max(1, min(own, room // at_once))
            texts, transient = batches.bytes_of(rows, at_once, longest, sampled)
            told = f"of {rows} rows at once"
        keeps = weights + texts < LITTLE * memory
        (keep_freed_memory if keeps else give_back_freed_memory)()
        if self.engine.model.device.type == "cpu":
            # A tensor rarely fits where one of the same size was: its alignment takes a few bytes more than were freed.
            # So where freed memory is kept there is about one gap for each tensor.
            self._plain.keeps_memory = keeps
            self.beside_tensors = self._workspaces + (transient if keeps else 0)
        self.need = max(weights + texts, self._bytes_to_check) + self.beside_tensors
        log.info(
            "members_at_once: %d of %d members answer together; their weights take %s, their texts %s %s%s",
            at_once,
            max(len(members), members.es.population_size),
            in_bytes(weights),
            told,
            in_bytes(texts),
            f", gaps between freed tensors and workspaces {in_bytes(self.beside_tensors)}"
            if self.beside_tensors
            else "",
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
        memory, auto = own_memory(es.plan.device), self.members_at_once == "auto"
        two = 2 * sum(t.nbytes for t in es.plan.tensors)
        # Before any memory is taken, which a GPU may not have
        if auto and es.rule.noise != "low_rank" and two > WEIGHTS_SHARE * memory:
            raise Unsupported(
                f"the weights of two take {in_bytes(two)}, and their share of the memory is "
                f"{in_bytes(WEIGHTS_SHARE * memory)}"
            )
        stack = self._new_stack(es, 2)
        self._bytes_to_check = stack.nbytes + max(stack.bytes_to_check, stack.bytes_to_write)
        share = (WEIGHTS_SHARE + TEXTS_SHARE) * memory
        if auto and self._bytes_to_check > share:
            raise Unsupported(
                f"to try out two together takes {in_bytes(self._bytes_to_check)}, and their share of the memory is "
                f"{in_bytes(share)}"
            )
        stack.write([(0, es.sigma), (1, es.sigma)])
        stack.check()
        self._bytes_of_member, self._bytes_to_write = stack.bytes_of_member, stack.bytes_to_write
        self._workspaces = stack.workspaces
        with engine.own_settings():
            room = can_drop(engine.model, engine.generation_config, room=True)
            drops = room or can_drop(engine.model, engine.generation_config)
        self.one_by_one = set(stack.learned.one_by_one)
        threads = Threads(sum(p.numel() for p in engine.model.parameters())) if is_small(engine.model) else None
        self._plain = Dropping(engine.model, engine.generation_config, drops, room, threads)
        with engine.own_settings():
            self.batches = SharedBatches(engine, self._static_or(self._plain), self._processes)

    def _static_or(self, plain: Dropping) -> StaticSteps | Dropping:
        """How batches are decoded: statically where one member's would be."""
        if "static" not in self.engine.ways:
            return plain
        try:
            return StaticSteps.instead_of(plain)
        except Unsupported as error:
            if "plain" not in self.engine.ways:
                raise
            log.info("several members generate plainly: %s", error)
            return plain

    def _stack_of(self, es, at_once: int) -> StackedModel:
        if self._stack is None or self._stack.at_once < at_once:
            self._free()
            self._stack = self._new_stack(es, at_once)
        return self._stack

    def _new_stack(self, es, at_once: int) -> StackedModel:
        kind = LowRankModel if es.rule.noise == "low_rank" else StackedModel
        return kind(es.plan, at_once, es.store.source_of_members, es.rule, es.perturb_rounding)

    # ---- asking ------------------------------------------------------------------------------------------------------

    def _written(self, members: Population, packet: list[Member]) -> Iterator[tuple[list[Member], StackedModel]]:
        """Yields the members of a packet, at most K in a list, and the stack that they were written to."""
        while packet:
            some = packet[: self.at_once]
            if not self._write(members, some):
                self._halve(some)
                continue
            packet = packet[len(some) :]
            members.on_placed()
            yield some, self._stack

    def _write(self, members: Population, some: list[Member]) -> bool:
        """Writes members to the stack. False if there is not enough memory for so many."""
        try:
            stack = self._stack_of(members.es, self.at_once)
            with self.batches.threads_to_write(len(some)):
                stack.write([(m.seed, m.sign * members.sigma) for m in some])
        except (RuntimeError, MemoryError) as error:
            if len(some) == 1 or not out_of_memory(error):
                raise
            return False
        return True

    def _halve(self, some: list[Member]) -> None:
        """Fewer members from now on than these, for which memory ran out. Call it outside an except block, whose
        traceback keeps the tensors alive."""
        self._free()
        self.at_once = -(-len(some) // 2)
        log.warning(
            "out of memory with %d members at once: going on with %d (members_at_once=%d spares the next run this)",
            len(some),
            self.at_once,
            self.at_once,
        )
        _free_memory()

    def _ask(
        self, members: Population, packet: list[Member], prompts: Sequence[str], seeds: Sequence[int] | None
    ) -> Answers:
        for some, stack in self._written(members, packet):
            own = [members.prompts_of(member) for member in some]
            owners = [k for k, o in enumerate(own) for _ in prompts[o]]
            texts = [prompt for o in own for prompt in prompts[o]]
            own_seeds = None if seeds is None else [seed for o in own for seed in seeds[o]]
            try:
                ask = self.batches if len(some) > 1 else self._complete
                found = ask(stack, owners, texts, own_seeds, OWN)
            except (RuntimeError, MemoryError) as error:
                if len(some) == 1 or not out_of_memory(error):
                    raise
                found = None
            if found is None:
                stack = None
                self._halve(some)
                yield from self._ask(members, some, prompts, seeds)
                continue
            each = len(found) // len(some)
            for k, member in enumerate(some):
                yield member, _texts(found[k * each : (k + 1) * each])

    def _complete(
        self,
        stack: StackedModel,
        owners: Sequence[int],
        texts: Sequence[str],
        seeds: Sequence[int] | None,
        asked: Asked,
    ) -> list[Completion | LogitsError]:
        """If memory runs out, half as many rows are generated at once from then on."""
        while True:
            try:
                return self.batches(stack, owners, texts, seeds, asked)
            except (RuntimeError, MemoryError) as error:
                if self.batches.rows <= 1 or not out_of_memory(error):
                    raise
            self.batches.way.close()
            self.engine.batch_size = self.batches.rows // 2
            log.warning(
                "out of memory with %d rows at once: going on with %d", self.batches.rows, self.engine.batch_size
            )
            _free_memory()


def _texts(found: Sequence[Completion | LogitsError]) -> list[str] | LogitsError:
    texts = []
    for answer in found:
        if isinstance(answer, LogitsError):
            return answer
        texts.append(answer.text)
    return texts


def _free_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
