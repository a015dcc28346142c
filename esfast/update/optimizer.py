"""Optimizer: the interface of optimizers, and how they are found by name. Does not import torch.

An optimizer turns a generation's reward-weighted noise g = sum_j coeffs[j] * noise(seeds[j]) into a step, which one
pass of `add_noise_` takes. It says which seeds and coefficients the pass adds up, and what becomes of the sum: it is
added to the weights, or an epilogue (esfast.core.epilogue) makes something else of it.
"""

from __future__ import annotations

import dataclasses
import json
from collections import deque
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from ..utils.errors import BadType, BadValue
from ..utils.suggest import did_you_mean, unknown

if TYPE_CHECKING:
    import torch

    from ..core.epilogue import Epilogue
    from ..core.plan import Plan
    from .updater import UpdateRecord

OPTIMIZERS: dict[str, type[Optimizer]] = {}


class Step(NamedTuple):
    """One pass of add_noise_: these seeds and coefficients, and an epilogue if the sum is not just added."""

    seeds: list[int]
    coeffs: list[float]
    epilogue: Epilogue | None = None


@dataclasses.dataclass
class State:
    """What an optimizer keeps between generations.

    Attributes:
        tensors: by name, float32 tensors on the plan's device, such as zeros(2, plan.flat_numel). Checkpoints hold them
            under these names; "low" and names that begin with a digit are taken.
        past: the generations before this one, the newest first, at most `maxlen` of them. A resumed run reads them from
            the journal.
    """

    tensors: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    past: deque[UpdateRecord] = dataclasses.field(default_factory=lambda: deque(maxlen=0))


class Optimizer:
    """An optimizer and its numbers, as a frozen dataclass. Its name makes it known to ES, journals and `--optimizer`:

        @dataclass(frozen=True)
        class SignSGD(Optimizer, name="sign_sgd"):
            fraction: float = 0.1

            def step(self, state, record, lr):
                ...

    Journals hold the name and the fields, which must be numbers, strings or booleans. A step may depend only on the
    fields, the state and the records of the generations, since a replay takes the same steps.

    Attributes:
        bytes_per_weight: memory of the state's tensors, in bytes for each weight; weights="auto" counts it.
        lr_in_coeffs: whether a generation's coefficients contain lr. If not, `step` applies lr.
    """

    name: ClassVar[str]
    bytes_per_weight: ClassVar[int] = 0
    lr_in_coeffs: ClassVar[bool] = True

    def __init_subclass__(cls, name: str = "", **options: Any):
        super().__init_subclass__(**options)
        if not name:
            return
        # In a notebook a class is often defined again; a dataclass with slots is made twice.
        if name in OPTIMIZERS and OPTIMIZERS[name].__qualname__ != cls.__qualname__:
            raise BadValue(f"optimizer: {name!r} is the name of {OPTIMIZERS[name].__qualname__}; choose another one")
        # abc would say so too, but Python 3.10's takes no class with an argument called `name`.
        if cls.step is Optimizer.step:
            raise BadType(f"optimizer: {cls.__qualname__} must have a method step(state, record, lr)")
        cls.name = name
        OPTIMIZERS[name] = cls

    def allocate_state(self, plan: Plan) -> State:
        """The state before the first generation, for the weights of `plan`."""
        return State()

    def step(self, state: State, record: UpdateRecord, lr: float) -> Step:
        """The step of a generation, for one group of weights; it is called once for each group.

        Args:
            state: what `allocate_state` returned. `state.past` does not hold `record` yet. An epilogue that gets
                `state.tensors` changes only the part that belongs to the group's weights.
            record: seeds, coefficients (float32 values), rewards, sigma and lr of the generation.
            lr: the group's factor of the learning rate; 1 without groups.
        """
        raise NotImplementedError

    @property
    def travel(self) -> float:
        """How far a generation's noise moves the weights in the end, in units of the step without an optimizer (of lr,
        if lr is no factor of the coefficients). What sigma="auto" and lr="auto" go by."""
        return 1.0

    @property
    def text(self) -> str:
        """The optimizer as a text, NAME:field=value,... or NAME, from which `check_optimizer` makes it again."""
        fields = {name: value for name, value in self.to_json().items() if name != "name"}
        numbers = ",".join(f"{name}={json.dumps(value)}" for name, value in fields.items())
        return f"{self.name}:{numbers}" if numbers else self.name

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, **dataclasses.asdict(self)}  # type: ignore[call-overload]


def find_optimizer(name: str) -> type[Optimizer]:
    """The optimizer of this name, also of an installed package with an entry point in the group "esfast.optimizers".
    ValueError if there is none."""
    if name not in OPTIMIZERS:
        from importlib.metadata import entry_points

        for point in entry_points(group="esfast.optimizers"):
            if point.name == name:
                point.load()
    if name not in OPTIMIZERS:
        known, hint = ", ".join(map(repr, OPTIMIZERS)), did_you_mean(name, OPTIMIZERS)
        raise BadValue(
            f"optimizer: expected one of {known}, got {name!r}.{hint} Your own is known once its module is imported"
        )
    return OPTIMIZERS[name]


def check_optimizer(value) -> Optimizer:
    """The optimizer itself, or that of a text: NAME, with its default numbers, or NAME:field=value,...

    Raises TypeError or ValueError for anything else, and what the optimizer raises for its numbers."""
    made = _parse(value) if isinstance(value, str) else value
    if not isinstance(made, Optimizer) or not hasattr(made, "name"):
        raise BadType(
            f"optimizer: expected {', '.join(map(repr, OPTIMIZERS))} or an esfast.SGD, Momentum or Adam, "
            f"got {made!r:.80}"
        )
    return made


def _parse(text: str) -> Optimizer:
    name, _, fields = text.partition(":")
    kind, given = find_optimizer(name), {}
    known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for part in fields.split(",") if fields else ():
        field, equals, value = part.partition("=")
        if not equals or field.strip() not in known:
            raise BadValue(f"optimizer: {unknown('field', field.strip(), known)} in {text!r}")
        try:
            given[field.strip()] = json.loads(value)
        except ValueError:
            raise BadValue(f"optimizer: expected a number after {field}= in {text!r}, got {value!r}") from None
    return kind(**given)
