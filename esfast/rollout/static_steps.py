"""Static decoding for the rows of several members.

`model.generate` launches each operation of each step from Python, which takes longer than a GPU computes. Here a step
reads and writes the same memory every time (`fixed`), is captured once as a CUDA graph and replayed (`graphs`). Members
that are written next lie where the last ones lay, so a graph serves the whole run. Prompts are read without a graph. On
a CPU the same steps run as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from transformers import GenerationConfig
from transformers.cache_utils import StaticLayer

from ..utils.memory import out_of_memory
from .decoding import Tokens, takes_static_cache, until_ended
from .dropping import MEASURED_ROWS, Dropping, unfinished_first
from .encoding import embedded_tokens
from .engine import generating
from .fixed import Arena, Steps, fixed_layers, length_of
from .graphs import CaptureFailed, addresses, captured
from .grouped_attention import grouped
from .member_tensor import Unsupported
from .memory import RowBytes, peak_bytes
from .probe import STEPS, first_logits, same_but_for_rounding
from .sampling import SeededSampling

log = logging.getLogger(__name__)

# After so many steps the host asks which texts have ended, and waits for the device.
LOOK = 8
# The oldest of more graphs is given up, and the tensors of its shape with the last graph of that shape.
MOST_GRAPHS = 64


class StaticSteps:
    """Decodes rows of several members from fixed tensors, like Dropping; `plain` does it if a step can't be captured.

    Prompts are padded to a multiple of 16 to 64 tokens, since each shape is captured by itself. A batch takes a shape
    that is there, with up to twice as many rows, rather than a new one. When each member has at most half of its rows
    unfinished, a batch goes on with half of its rows.
    """

    # Ended rows leave the batch, and the cache takes its memory once.
    drops = room = True
    threads = None

    def __init__(self, plain: Dropping):
        self.plain, self.model, self.config = plain, plain.model, plain.config
        self.most, self.pad = plain.config.max_new_tokens, plain.config.pad_token_id
        self._ends = torch.tensor(plain.config.eos_token_id or [], dtype=torch.long, device=self.model.device)
        self._arena, self._room = Arena(), 0
        self._steps: dict[tuple, Steps] = {}
        self._graphs: dict[tuple, torch.cuda.CUDAGraph] = {}
        self._captures = self.model.device.type == "cuda"
        # why steps can't be captured, once that is known
        self.failed: str | None = None

    @classmethod
    def instead_of(cls, plain: Dropping) -> StaticSteps:
        """Unsupported if the model can't generate from fixed tensors."""
        reason = refusal(plain.model, plain.config)
        if reason is not None:
            raise Unsupported(f"decoding='static' for several members: {reason}; take decoding='plain'")
        return cls(plain)

    def __call__(
        self,
        rows: Sequence[Sequence[int]],
        members: int,
        sampling: SeededSampling | None = None,
        most: int | None = None,
        counts: Sequence[bool] | None = None,
    ) -> tuple[Tokens, list[bool]]:
        """See Dropping."""
        if self.failed is None:
            try:
                with torch.no_grad(), grouped(self.model), torch.cuda.device_of(self._ends):
                    return self._generate(rows, members, sampling, most or self.most, counts or [True] * len(rows))
            except CaptureFailed as error:
                log.warning("static decoding doesn't work here for several members, going on plainly: %s", error)
                self.failed = str(error)
            # outside the except block, whose traceback keeps tensors alive
            self.close()
        return self.plain(rows, members, sampling, most, counts)

    def row_bytes(self, tokens: int, sampling: SeededSampling | None = None) -> RowBytes:
        """See Dropping."""
        width, prompts = _width([tokens]), [[1] * tokens] * MEASURED_ROWS

        def first_and_next() -> None:
            with torch.no_grad(), grouped(self.model):
                steps = self._steps_of(MEASURED_ROWS, width, sampling, Arena())
                steps.read(prompts, None if sampling is None else sampling.numbers)
                if self.most > 1:
                    steps.step()

        return RowBytes(peak_bytes(first_and_next) // MEASURED_ROWS)

    def close(self) -> None:
        """Frees buffers and graphs."""
        self._graphs.clear()
        self._steps.clear()
        self._arena.clear()
        self._room = 0

    def _generate(
        self,
        rows: Sequence[Sequence[int]],
        members: int,
        sampling: SeededSampling | None,
        most: int,
        counts: Sequence[bool],
    ) -> tuple[Tokens, list[bool]]:
        device, each = self.model.device, len(rows) // members
        width = _width(list(map(len, rows)))
        drawn = sampling and (sampling.temperature, sampling.top_p)
        size = self._size(members, each, (width, drawn))
        room = members * size * length_of(width, self.most)
        if room > self._room:
            self.close()
            self._room = room
        # numbers of the rows in the batch, (members, rows of each); a member's first row fills its places up
        first = torch.arange(members, device=device)[:, None] * each
        place = torch.arange(size, device=device)
        which = first + place * (place < each)
        filled = which.flatten().tolist()
        counting = (place < each).repeat(members) & torch.tensor(counts, device=device)[which.flatten()]
        texts = torch.full((members * size, self.most), self.pad, dtype=torch.long, device=device)
        fine = torch.ones(members * size, dtype=torch.bool, device=device)
        steps, step = self._ready(members * size, width, sampling, drawn)
        steps.read(
            [rows[i] for i in filled],
            None if sampling is None else sampling.numbers[which.flatten()],
            counting.tolist(),
        )
        which = torch.arange(members * size, device=device).view(members, size)
        left = most - 1
        while left:
            for _ in range(min(LOOK, left)):
                step()
            left -= min(LOOK, left)
            unfinished = ~steps.ended.view(which.shape)
            count = int(unfinished.sum(1).max())
            if not count:
                break
            had = size
            while size > 1 and -(-size // 2) >= count:
                size = -(-size // 2)
            if left and size < had:
                texts[which.flatten()], fine[which.flatten()] = steps.texts, steps.fine
                places = unfinished_first(unfinished)[:, :size]
                kept = steps.kept((places + torch.arange(members, device=device)[:, None] * had).flatten())
                which = which.gather(1, places)
                steps, step = self._ready(members * size, width, sampling, drawn)
                steps.go_on(kept)
        texts[which.flatten()], fine[which.flatten()] = steps.texts, steps.fine
        texts = texts.view(members, -1, self.most)[:, :each, :most].flatten(0, 1)
        return until_ended(texts, self._ends), fine.view(members, -1).all(1).tolist()

    def _size(self, members: int, each: int, kind: tuple) -> int:
        """Rows of each member, of which `each` are needed."""
        known = (shape[0] // members for shape in self._steps if shape[1:] == kind and shape[0] % members == 0)
        return min((size for size in known if each <= size <= 2 * each), default=each)

    def _ready(
        self, rows: int, width: int, sampling: SeededSampling | None, drawn: tuple | None
    ) -> tuple[Steps, Callable[[], object]]:
        """The Steps of a shape and what does one of them, for the weights that are in the model now."""
        shape = rows, width, drawn
        if shape not in self._steps:
            self._steps[shape] = self._steps_of(rows, width, sampling, self._arena)
        steps = self._steps[shape]
        if not self._captures or self.most == 1:
            return steps, steps.step
        key = shape, addresses(self.model)
        if key not in self._graphs:
            beside = next(iter(self._graphs.values()), None)
            if len(self._graphs) >= MOST_GRAPHS:
                oldest = next(iter(self._graphs))
                del self._graphs[oldest]
                if oldest[0] not in {shape, *(of_shape for of_shape, _ in self._graphs)}:
                    del self._steps[oldest[0]]
            self._graphs[key] = captured(steps.blank, steps.step, beside)
        return steps, self._graphs[key].replay

    def _steps_of(self, rows: int, width: int, sampling: SeededSampling | None, arena: Arena) -> Steps:
        return Steps(self.model, rows, width, self.most, self._ends, self.pad, sampling, arena)


def _width(lengths: Sequence[int]) -> int:
    """Of prompts of these lengths, with padding: of more than 64 tokens, it is a third at most."""
    longest = max(lengths)
    unit = 16 if longest <= 64 else 32 if longest <= 256 else 64
    return -(-longest // unit) * unit


def on_one_device(model) -> bool:
    """Whether all weights are. A graph holds the work of one device."""
    return len({weight.device for weight in model.parameters()}) <= 1


def refusal(model, config: GenerationConfig) -> str | None:
    """Why a model can't generate from fixed tensors; None if its logits are those of `generate`."""
    kind = type(model).__name__
    if not on_one_device(model):
        return f"this {kind} lies on several devices, and a graph holds the work of one"
    try:
        other = [c.__name__ for c in fixed_layers(model) if not issubclass(c, StaticLayer) or _keeps_more(c)]
    except Exception as error:
        return f"Transformers makes no static cache for a {kind}: {error!s:.200}"
    if other:
        return f"a {kind} keeps other states than keys and values ({other[0]})"
    if not takes_static_cache(model):
        return f"a {kind} does not support a static cache"
    usual = range(3, max(4, min(embedded_tokens(model), 200)))
    rows = [[usual[(31 * i + 17 * j) % len(usual)] for j in range(n)] for i, n in enumerate((5, 3, 4))]
    made = GenerationConfig(pad_token_id=config.pad_token_id)
    none = torch.tensor([], dtype=torch.long, device=model.device)
    with torch.no_grad():
        try:
            # No token may end these texts.
            with generating(model, made):
                expected = first_logits(model, made, rows)
            with grouped(model):
                steps = Steps(model, len(rows), 8, STEPS, none, config.pad_token_id, None, Arena())
                found = torch.stack([steps.read(rows), *(steps.step() for _ in range(STEPS - 1))], 1).float()
        except Exception as error:
            if out_of_memory(error):
                raise
            return f"a {kind} can't generate from fixed tensors: {type(error).__name__}: {error!s:.200}"
    if not same_but_for_rounding(expected, found.clamp(min=-1e4), model.dtype):
        return f"a {kind} answers otherwise from fixed tensors"
    return None


def _keeps_more(layer: type) -> bool:
    return hasattr(layer, "update_indexer") or hasattr(layer, "update_conv_state")
