"""Shared by the GPU backends: divides a plan's segments into tiles, one for each block of a launch, and puts seeds and
coefficients on the device. Each pair of formats (of source and destination) has a launch of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...utils.errors import BadValue
from ..segments import BFLOAT16, FIELDS, FLOAT32, SPLIT, Table

# bytes of an element, by format
_SIZES = np.array([4, 2, 2, 2])


def members_on(device: torch.device, seeds, coeffs) -> tuple[torch.Tensor, torch.Tensor]:
    """Copies seeds (a uint64 array) and coefficients (float32) to the device, as int64 and float32 tensors. Tensors are
    returned unchanged."""
    if isinstance(seeds, torch.Tensor):
        return seeds, coeffs

    def there(values: np.ndarray) -> torch.Tensor:
        # The driver buffers small copies from pageable memory, so the host does not wait for the stream.
        return torch.from_numpy(values).to(device, non_blocking=True)

    return there(seeds.view(np.int64)), there(coeffs)


def copy_base(call, tile: int, copy_tiles: Callable[[torch.Tensor, int], None]) -> None:
    """Copies base into plan. Used when no arithmetic is needed (`call.is_copy`).

    It launches `copy_tiles(records, bytes of a weight)` once for each format of weights, so mostly once for a model.
    The alternatives are slower. A 7B model's 15 GB take 10 ms at 3 TB/s. PyTorch's _foreach_copy_ makes about 360
    launches of 320 blocks, one every 28 us, which 132 multiprocessors share unevenly. copy_ for each of 339 tensors
    waits 1 to 2 us between them; 141 of these are norms and biases, whose copying takes no longer than the wait. One
    launch fills the GPU once, and the tiles are there already, for perturbing from the base.
    """
    if call.base is None or call.base is call.plan:
        return
    for t in tiles_of(call.table, tile, call.plan.device, False):
        copy_tiles(t.records, int(_SIZES[t.dst_format]))


@dataclass(frozen=True)
class Tiles:
    """Tiles of one pair of formats, on the device: `records`, int64 (tiles, 4), and `extras`, int64 (tiles, 2) or
    None."""

    src_format: int
    dst_format: int
    records: torch.Tensor
    extras: torch.Tensor | None


def tiles_of(table: Table, tile: int, device: torch.device, extras: bool) -> list[Tiles]:
    """The tiles of a table's segments, kept with it. `extras`: with anchors and places in the flat buffers."""
    key = tile, extras
    if key not in table.device:
        pairs = np.stack([table.column("src_format"), table.column("dst_format")], axis=1)
        found = []
        for src, dst in np.unique(pairs, axis=0):
            records, more = tile_table(table.rows[(pairs == (src, dst)).all(axis=1)], tile, extras)
            places = torch.from_numpy(more).to(device) if extras else None
            found.append(Tiles(int(src), int(dst), torch.from_numpy(records).to(device), places))
        table.device[key] = found
    return table.device[key]


def pack_span(tensor_id, begin, end, whole):
    """Packs into an int64 the tensor's id and which elements of a tile (at most 2^15) exist: [begin, end). `whole` says
    that all exist, and that every address of the tile's first element is a multiple of 16."""
    return tensor_id << 32 | whole << 31 | end << 15 | begin


def tile_table(segments: np.ndarray, tile: int, extras: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Divides segments of one pair of formats into tiles.

    Returns two int64 arrays. The first, (tiles, 4), has the addresses of dst and src, the number of the tile's first
    element, and `pack_span(...)`. The second, (tiles, 2), has the address of the anchor (or 0) and the place in the
    flat buffers. They take 32 and 16 bytes for every 8 KiB of 16-bit weights, which is 0.4 and 0.2 %.

    ValueError if there are more tiles than one launch can have.
    """
    column = {name: segments[:, i] for i, name in enumerate(FIELDS)}
    # The most tiles that a row can have, as tiles_per_row of csrc/cpu.h.
    per_row = (column["cols"] + tile - 2) // tile + 1
    counts = column["rows"] * per_row
    if counts.sum() >= 2**31:
        raise BadValue(f"Plan: its {counts.sum()} tiles are more than one launch can have, 2**31 - 1")
    of = np.repeat(np.arange(len(segments)), counts)  # the segment of each tile
    local = np.arange(counts.sum()) - (np.cumsum(counts) - counts)[of]
    row, place = np.divmod(local, per_row[of])
    start = column["first"][of] + row * column["index_stride"][of]  # number of the row's first element
    tile_start = (start // tile + place) * tile
    skipped = tile_start - start
    begin, end = np.maximum(-skipped, 0), np.minimum(column["cols"][of] - skipped, tile)

    def address(what: str, size: int) -> np.ndarray:
        return column[what][of] + (row * column[f"{what}_stride"][of] + skipped) * size

    src_format, dst_format = (int(column[f"{side}_format"][0]) for side in ("src", "dst"))
    dst, src = address("dst", _SIZES[dst_format]), address("src", _SIZES[src_format])
    flat = column["flat"][of] + row * column["cols"][of] + skipped
    anchor_format = BFLOAT16 if dst_format == SPLIT else dst_format
    anchor = np.where(column["anchor"][of] != 0, address("anchor", 4 if anchor_format == FLOAT32 else 2), 0)
    aligned = (dst | src) % 16 == 0
    if extras or SPLIT in (src_format, dst_format):
        aligned &= (anchor % 16 == 0) & (flat % 8 == 0)
    whole = ((begin == 0) & (end == tile) & aligned).astype(np.int64)
    records = np.stack([dst, src, tile_start, pack_span(column["tensor_id"][of], begin, end, whole)], axis=1)
    kept = end > begin
    return np.ascontiguousarray(records[kept]), np.ascontiguousarray(np.stack([anchor, flat], axis=1)[kept])


# ---- low-rank noise: tiles of matrices ------------------------------------------------------------------------------

# Columns of a tile of a matrix.
MATRIX_COLS = 128


@dataclass(frozen=True)
class MatrixTiles:
    """Tiles of one pair of formats, on the device: `segments`, rows of a segment table, and `records`, int64
    (tiles, 4)."""

    src_format: int
    dst_format: int
    segments: torch.Tensor
    records: torch.Tensor


def matrix_tiles_of(call, rows: int, part_rows: int) -> list[MatrixTiles]:
    """The tiles that a Call with low-rank noise works on, kept with its table: see matrix_table."""
    table, device = call.table, call.plan.device
    if len(call.seeds) * call.rank >= 2**31:
        raise BadValue(f"seeds: {len(call.seeds)} members of rank {call.rank} have more than 2**31 - 1 factors")
    key = rows, part_rows, call.needs_extras, call.rank > 1
    if key not in table.device:
        pairs = np.stack([table.column("src_format"), table.column("dst_format")], axis=1)
        found = []
        for src, dst in np.unique(pairs, axis=0):
            segments = np.ascontiguousarray(table.rows[(pairs == (src, dst)).all(axis=1)])
            records = matrix_table(segments, rows, part_rows, *key[2:])
            found.append(
                MatrixTiles(int(src), int(dst), *(torch.from_numpy(a).to(device) for a in (segments, records)))
            )
        table.device[key] = found
    return table.device[key]


def matrix_table(segments: np.ndarray, rows: int, part_rows: int, extras: bool, steps: bool) -> np.ndarray:
    """Divides segments that were cut for low-rank noise, of one pair of formats, into tiles.

    Returns an int64 array (tiles, 4): the segment, the row and the column in it where the tile begins, and
    whole << 31 | aligned << 30 | vector << 29 | rows << 8 | columns, where rows and columns count those that exist.

    - whole: the tile has `rows` rows and MATRIX_COLS columns, is `aligned`, and the numbers of its elements and factors
      begin at multiples of 4. Kernels then read 128 bits, and draw four numbers, at once. Other tiles have at most
      `part_rows` rows.
    - aligned: all rows begin at multiples of 16 bytes, in every memory that the call uses.
    - vector: the tile is one row of a vector.

    extras: the call uses flat buffers and anchors too. steps: it uses more than one factor.

    ValueError if there are more tiles than one launch can have.
    """
    column = {name: segments[:, i] for i, name in enumerate(FIELDS)}
    vector = column["a_step"] == 0
    height = np.where(vector, 1, rows)
    across = -(-column["cols"] // MATRIX_COLS)
    counts = -(-column["rows"] // height) * across
    if counts.sum() * (rows // part_rows) >= 2**31:
        raise BadValue(f"Plan: its {counts.sum()} tiles are more than one launch can have, 2**31 - 1")
    src_format, dst_format = (int(column[f"{side}_format"][0]) for side in ("src", "dst"))
    bits: Any = column["flat"] * 2 | column["flat_stride"] * 2 if extras or SPLIT in (src_format, dst_format) else 0
    sides = {"src": _SIZES[src_format], "dst": _SIZES[dst_format], "anchor": _SIZES[dst_format]}
    for side, size in sides.items():
        bits |= np.where(column[side] != 0, column[side] | column[f"{side}_stride"] * size, 0)
    numbers = column["first"] | column["index_stride"] | column["a_first"] | column["b_first"]
    if steps:
        numbers = numbers | column["a_step"] | column["b_step"]
    aligned = bits % 16 == 0
    of = np.repeat(np.arange(len(segments)), counts)  # the segment of each tile
    local = np.arange(counts.sum()) - (np.cumsum(counts) - counts)[of]
    row, place = np.divmod(local, across[of])
    row, place = row * height[of], place * MATRIX_COLS
    there = np.minimum(height[of], column["rows"][of] - row)
    cols = np.minimum(MATRIX_COLS, column["cols"][of] - place)
    whole = (aligned & (numbers % 4 == 0) & ~vector)[of] & (there == rows) & (cols == MATRIX_COLS)

    parts = np.where(whole, 1, -(-there // part_rows))
    again = np.repeat(np.arange(len(of)), parts)
    skipped = (np.arange(parts.sum()) - (np.cumsum(parts) - parts)[again]) * part_rows
    of, row, place, cols, whole = (a[again] for a in (of, row, place, cols, whole))
    there = np.where(whole, rows, np.minimum(part_rows, there[again] - skipped))
    flags = whole.astype(np.int64) << 31 | aligned[of].astype(np.int64) << 30 | vector[of].astype(np.int64) << 29
    return np.ascontiguousarray(np.stack([of, row + skipped, place, flags | there << 8 | cols], axis=1))
