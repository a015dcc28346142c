"""MeZO (Malladi et al., arXiv 2305.17333) on esfast's noise: two functions, and a mixin for transformers.Trainer.

MeZO perturbs in place by +1, -2 and +1 times eps * z, draws z again each time, and then steps along z by the projected
gradient (L+ - L-) / (2 eps). Because of rounding, the weights after its three moves differ from those before. Here each
move is one fused pass that writes the weights from a base, so they come back to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from ..core.plan import Plan
from ..core.plan_source import missing_parameter
from ..es.es import member_seed
from ..es.weights import MODES
from ..update.updater import Rule, UpdateRecord
from ..utils.errors import BadState, BadValue
from ..utils.settings import check_number, check_positive, number
from ..utils.unwrap import named_parameters
from .offsets import Offsets

# Weights with one of these in their name don't decay, as in MeZO.
NOT_DECAYED = ("bias", "layer_norm", "layernorm")


class ZOParameters:
    """The weights that MeZO changes, and how they are perturbed.

    If something else writes the weights between two steps (loading a checkpoint, an averaging callback), the next step
    starts from the new weights. Writes through `.data` can't be detected: call `refresh` after them.

    Args:
        model: an nn.Module (its parameters that require a gradient), a Plan, or an iterable of (name, tensor).
        zo_eps: size of the perturbation. > 0.
        weights: "base" (exact; one copy of the weights), "master" (exact, updates in float32), "host" or "inplace" (no
            copy, and the rounding errors of MeZO); see esfast.es.weights.
        noise, rank, rounding, backend: as in `add_noise_`.
        weight_decay: of `zo_update`, for all weights but those with "bias" or "layer norm" in their name.
    """

    def __init__(
        self,
        model: torch.nn.Module | Plan | Iterable[tuple],
        zo_eps: float = 1e-3,
        weights: str = "base",
        noise: str = "gaussian",
        rounding: str = "nearest",
        weight_decay: float = 0.0,
        backend: str = "auto",
        rank: int = 1,
    ):
        if weights not in MODES:
            raise BadValue(f"weights: expected one of {', '.join(map(repr, MODES))}, got {weights!r}")
        self.zo_eps = check_positive("zo_eps", zo_eps)
        self.weight_decay = number("weight_decay", weight_decay)
        check_number("weight_decay", self.weight_decay, 0)
        if isinstance(model, Plan):
            model = [(e.name, e.tensor, e.window) for e in model.entries]
        elif isinstance(model, torch.nn.Module):
            model = [(n, p) for n, p in named_parameters(model) if p.requires_grad]
        items = list(model)
        self.tensors = [(name, tensor) for name, tensor, *_ in items]
        still = [i for i in items if self.weight_decay and any(part in i[0] for part in NOT_DECAYED)]
        moved = [i for i in items if not any(i is s for s in still)]
        rule = Rule(noise, rounding, rank=rank)
        self.updates = 0
        # Weights with the same decay form a group, and each group is one pass: two passes if only some weights decay.
        self.groups = [
            (Offsets(MODES[weights](Plan(group), rule, backend)), decay)
            for group, decay in ((moved, self.weight_decay), (still, 0.0))
            if group
        ]

    def refresh(self) -> None:
        """Takes the present weights as the new base. Call it when no noise is in place."""
        for offsets, _ in self.groups:
            if offsets.terms:
                raise BadState(f"refresh: the noise of seed {next(iter(offsets.terms))} is still in place")
            offsets.mode.adopt()


def zo_perturb_parameters(parameters: ZOParameters, random_seed: int, scaling_factor: float = 1) -> None:
    """Adds scaling_factor * zo_eps * noise(random_seed) to the weights, in one pass.

    Factors add up: after +1, -2 and +1 the weights have the same bits as before ("inplace": nearly).
    """
    for offsets, _ in parameters.groups:
        offsets.add(random_seed, number("scaling_factor", scaling_factor) * parameters.zo_eps)


def zo_update(
    parameters: ZOParameters,
    random_seed: int | Sequence[int],
    projected_grad: float | Sequence[float],
    learning_rate: float,
) -> None:
    """Moves the weights by -learning_rate * (projected_grad * noise(random_seed) + weight_decay * weights).

    It is one pass. With several seeds, each with its gradient, the step is along their mean.

    Raises:
        RuntimeError: a perturbation is in place.
        TypeError, ValueError: `add_noise_` refuses an argument, for example a gradient that is not finite. No weight
            has changed.
    """
    several = isinstance(random_seed, Sequence)
    given: Any = (random_seed, projected_grad) if several else ([random_seed], [projected_grad])
    seeds, grads = map(list, given)
    rate = number("learning_rate", learning_rate)
    if not math.isfinite(rate):
        raise BadValue(f"learning_rate: expected a finite number, got {rate}")
    coeffs = [-rate * number("projected_grad", g) / len(seeds) for g in grads]
    for offsets, _ in parameters.groups:
        if offsets.terms:
            raise BadState(f"zo_update: the noise of seed {next(iter(offsets.terms))} is still in place")
    for offsets, decay in parameters.groups:
        offsets.follow()
        offsets.mode.update(UpdateRecord(parameters.updates, seeds, coeffs, [], parameters.zo_eps, rate, rate * decay))
    parameters.updates += 1


class ZOOptimizer(torch.optim.Optimizer):
    """The optimizer that a Trainer sees. A schedule sets its learning rate; its step is the trainer's `zo_update`."""

    def __init__(self, trainer: MeZOMixin, parameters: list[torch.nn.Parameter], lr: float):
        super().__init__(parameters, {"lr": lr})
        self.trainer = trainer

    def step(self, closure=None) -> None:
        self.trainer.zo_apply(self.param_groups[0]["lr"])


class MeZOMixin:
    """Makes a transformers.Trainer train by MeZO: `class MyTrainer(MeZOMixin, Trainer): pass`.

    It runs forward passes only, in eval mode and without gradients. Batches, schedules, logging, checkpoints and
    callbacks remain the Trainer's. With gradient_accumulation_steps=n a step is along the mean of n seeds. In front of
    a MeZO trainer with a loop of its own (`class MyTrainer(MeZOMixin, OurTrainer)`), it replaces zo_perturb_parameters
    and zo_update, and keeps their arguments and attributes (zo_random_seed, projected_grad).

    Attributes: zo_eps (overridden by a `zo_eps` in the TrainingArguments), zo_weights, zo_noise and zo_rank, as in
    ZOParameters. Seeds are a function of args.seed and the step, so a resumed run draws the same seeds as an unbroken
    one.
    """

    # Attributes of the Trainer, declared for the type checker.
    args: Any
    state: Any
    model: Any
    accelerator: Any
    optimizer: Any
    lr_scheduler: Any
    compute_loss: Callable[..., torch.Tensor]
    compute_loss_context_manager: Callable[[], AbstractContextManager]
    _prepare_inputs: Callable[[Any], Any]

    zo_eps = 1e-3
    zo_weights = "base"
    zo_noise = "gaussian"
    zo_rank = 1

    def __init__(self, *args, **kwargs):
        self._zo: ZOParameters | None = None
        self._zo_pending: list[tuple[int, float]] = []  # seeds and gradients since the last step
        super().__init__(*args, **kwargs)

    @property
    def zo_parameters(self) -> ZOParameters:
        if self._zo is None:
            if self.args.fp16:
                raise BadValue("MeZO: fp16=True scales gradients, of which there are none; load the model in float16")
            self._zo = ZOParameters(
                self.accelerator.unwrap_model(self.model),
                getattr(self.args, "zo_eps", self.zo_eps),
                self.zo_weights,
                self.zo_noise,
                weight_decay=self.args.weight_decay,
                rank=self.zo_rank,
            )
        return self._zo

    def zo_perturb_parameters(self, random_seed: int | None = None, scaling_factor: float = 1) -> None:
        seed = self.zo_random_seed if random_seed is None else random_seed
        zo_perturb_parameters(self.zo_parameters, seed, scaling_factor)

    def zo_update(self, model=None) -> None:
        self._zo_pending[:] = [(self.zo_random_seed, self.projected_grad)]
        self.optimizer.step()
        self.lr_scheduler.step()

    def zo_forward(self, model, inputs) -> torch.Tensor:
        """The loss of a batch, the mean over all processes."""
        model.eval()
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return self.accelerator.gather(loss.detach()).mean()

    def zo_step(self, model, inputs) -> torch.Tensor:
        """Does both forward passes and sets zo_random_seed and projected_grad; returns the loss at +eps. The weights
        are as before. ValueError if a loss is NaN or infinite; RuntimeError if the model's parameters were replaced
        since the training began."""
        plain = self.accelerator.unwrap_model(self.model)
        if name := missing_parameter(plain, *zip(*self.zo_parameters.tensors, strict=True)):
            raise BadState(
                f"MeZO: {name!r} is no longer a parameter of the model (load_state_dict with assign=True?); load "
                "weights without assign, or begin a new train()"
            )
        self.zo_random_seed = member_seed(self.args.seed, self.state.global_step, len(self._zo_pending))
        eps, losses = self.zo_parameters.zo_eps, []
        try:
            for factor in (1, -2):
                self.zo_perturb_parameters(scaling_factor=factor)
                losses.append(self.zo_forward(model, inputs))
        finally:
            for offsets, _ in self.zo_parameters.groups:
                offsets.clear()
        self.projected_grad = ((losses[0] - losses[1]) / (2 * eps)).item()
        if not math.isfinite(self.projected_grad):
            raise BadValue(
                f"MeZO: the losses at step {self.state.global_step} are {losses[0].item():g} and {losses[1].item():g}; "
                "the weights are as they were before it. Lower learning_rate or zo_eps"
            )
        return losses[0]

    # ---- what transformers.Trainer calls ---------------------------------------------------------------------------

    def train(self, *args, **kwargs):
        """Trains from the present weights, model and arguments, whatever an earlier call left."""
        self._zo, self._zo_pending = None, []
        return super().train(*args, **kwargs)  # type: ignore[misc]  # the Trainer beside it has it

    def create_optimizer(self, model=None) -> ZOOptimizer:
        if self.optimizer is None:
            trained = [p for p in self.model.parameters() if p.requires_grad]
            self.optimizer = ZOOptimizer(self, trained, self.args.learning_rate)
        return self.optimizer

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        loss = self.zo_step(model, inputs)
        self._zo_pending.append((self.zo_random_seed, self.projected_grad))
        return loss / getattr(self, "current_gradient_accumulation_steps", self.args.gradient_accumulation_steps)

    def zo_apply(self, lr: float) -> None:
        """Steps along the seeds of all batches since the last step."""
        pending, self._zo_pending = self._zo_pending, []
        zo_update(self.zo_parameters, [seed for seed, _ in pending], [grad for _, grad in pending], lr)
