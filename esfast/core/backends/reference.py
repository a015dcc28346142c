"""add_noise_ in NumPy, slow and obvious. Tests compare every backend with it, to the bit."""

from __future__ import annotations

import numpy as np
import torch

from ..epilogue import Epilogue
from ..noise import DOMAINS, add_low_rank, fma, noise_at, philox, tensor_id
from ..segments import FLOAT16, SPLIT, Entry


def run(call) -> None:
    """Runs `call`, an ops.Call; see ops.add_noise_."""
    plan, base = call.plan, call.base or call.plan
    anchors = call.anchor.entries if call.anchor is not None else [None] * len(plan)
    for dst, src, anchor in zip(plan.entries, base.entries, anchors, strict=True):
        flat = dst.flat
        x = _read(src, base.low, flat)
        if call.decay:
            toward = _read(anchor, None, 0) if anchor is not None else np.float32(0)
            x = fma(call.decay, toward - x, x)
        index = element_numbers(dst).reshape(-1)
        acc = np.zeros_like(x) if call.epilogue is not None else x
        for seed, coeff in zip(call.seeds, call.coeffs, strict=True):
            if call.kind == "low_rank":
                acc = add_low_rank(acc, coeff, int(seed), dst.name, dst.window.shape, index, call.rank)
            else:
                acc = fma(coeff, noise_at(int(seed), dst.name, index, call.kind), acc)
        if call.epilogue is not None:
            x = _apply(call.epilogue, x, acc, flat)
        elif len(call.seeds) or call.decay:
            x = acc
        elif src.format == dst.format:
            # No arithmetic is needed: copy, so that NaNs keep their payload.
            if dst is not src:
                dst.tensor.detach().copy_(src.tensor.detach())
            continue
        words = None
        if call.stochastic and len(call.seeds):
            block, lane = np.divmod(index, np.uint64(4))
            of_block = philox(int(call.seeds[0]), block, tensor_id(dst.name), DOMAINS["stochastic_rounding"])
            words = np.choose(lane.astype(np.int64), of_block)
        _write(dst, plan.low, flat, x, words)


def element_numbers(e: Entry) -> np.ndarray:
    """Row-major numbers of the tensor's elements in the whole tensor: a uint64 array of the tensor's shape."""
    corner = np.ix_(*(np.arange(o, o + n) for o, n in zip(e.window.offset, e.tensor.shape, strict=True)))
    return np.asarray(np.ravel_multi_index(corner, e.window.shape) if corner else np.zeros(()), dtype=np.uint64)


def _read(e: Entry, low: torch.Tensor | None, flat: int) -> np.ndarray:
    values = e.tensor.detach().cpu().to(torch.float32).reshape(-1).numpy()
    if e.format != SPLIT:
        return values
    half = low[flat : flat + values.size].cpu().numpy()
    return (values.view(np.int32) + half).view(np.float32)


def _write(e: Entry, low: torch.Tensor | None, flat: int, x: np.ndarray, words: np.ndarray | None) -> None:
    if e.format == SPLIT:
        bits = np.where(np.isnan(x), np.uint32(0x7FC00000), x.view(np.uint32))
        low[flat : flat + x.size].copy_(torch.from_numpy(bits.astype(np.uint16).view(np.int16)))
        high = ((bits + np.uint32(0x8000)) >> np.uint32(16)).astype(np.uint16).view(np.int16)
        values = torch.from_numpy(high).view(torch.bfloat16)
    elif words is None or e.tensor.dtype is torch.float32:
        values = torch.from_numpy(x).to(e.tensor.dtype)
    else:
        values = torch.from_numpy(round_stochastically(x, words, e.format).view(np.int16)).view(e.tensor.dtype)
    e.tensor.detach().copy_(values.reshape(e.tensor.shape))


def round_stochastically(x: np.ndarray, words: np.ndarray, fmt: int) -> np.ndarray:
    """Rounds float32 `x` stochastically to float16 or bfloat16; returns the uint16 bits.

    x lies between two 16-bit neighbours. It becomes the one farther from zero with probability (x - the other) divided
    by their distance, so the mean is x. The upper 16 bits of `words` decide. Rounding drops 13 or 16 bits of a normal
    float32, so the probability is exact; for a subnormal float16 it is cut to 16 bits.
    """
    bits, random = (
        x.view(np.uint32).astype(np.uint64),
        (words >> np.uint32(16)).astype(np.uint64),
    )
    sign, magnitude = bits >> np.uint64(31) << np.uint64(15), bits & np.uint64(0x7FFFFFFF)
    nan = magnitude > 0x7F800000
    if fmt != FLOAT16:
        found = (magnitude + random) >> np.uint64(16)
        return np.where(nan, 0x7FC0, found | sign).astype(np.uint16)
    normal = (magnitude + (random >> np.uint64(3)) - np.uint64(112 << 23)) >> np.uint64(13)
    with np.errstate(invalid="ignore"):
        units = np.where(magnitude < 0x38800000, np.abs(x).astype(np.float64) * 2.0**40, 0).astype(np.uint64)
    found = np.where(magnitude < 0x38800000, (units + random) >> np.uint64(16), normal)
    found = np.where(magnitude >= 0x47800000, np.where(nan, 0x7E00, 0x7C00), found)
    return (found.astype(np.uint64) | sign).astype(np.uint16)


def _apply(epilogue: Epilogue, x: np.ndarray, g: np.ndarray, flat: int) -> np.ndarray:
    mine = epilogue.buffers[:, flat : flat + x.size]
    values = mine.cpu().numpy().copy()
    with np.errstate(all="ignore"):
        x = epilogue.apply(x, g, values)
    mine.copy_(torch.from_numpy(values))
    return x
