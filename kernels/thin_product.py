"""Low-rank noise in the result of a linear layer: y += (x A^T) B + bias, in one launch for the rows of all members.

Each member has its own A, B and bias. A program computes (x A^T) of its rows and adds the product with some columns of
B. Programs beside each other read the same rows of x, which are few enough to be in the cache: reading them again costs
less than a launch of its own.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def add_thin_product_kernel(
    y,  # [members * rows, out], contiguous
    x,  # [members * rows, size], of unit stride within a row
    a,  # [members, RANK, size]
    b,  # [members, RANK, out]
    bias,  # [members, out]; not read without BIAS
    rows,  # of each member
    size,
    out,
    x_stride,
    blocks,  # of rows of each member
    RANK: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
    OUT: tl.constexpr,
):
    member = tl.program_id(0) // blocks
    row = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)
    there = (row < rows)[:, None]
    row = (member * rows + row).to(tl.int64)[:, None]
    member = member.to(tl.int64)
    first = member * RANK
    column = tl.program_id(1) * OUT + tl.arange(0, OUT)
    inside = column < out
    at = y + row * out + column[None, :]
    mask = there & inside[None, :]
    total = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    if BIAS:
        total += tl.load(bias + member * out + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    i = tl.arange(0, SIZE)
    if RANK == 1:
        sums = tl.zeros((ROWS, SIZE), tl.float32)
        for begin in range(0, size, SIZE):
            some = begin + i < size
            xs = tl.load(x + row * x_stride + (begin + i)[None, :], mask=there & some[None, :], other=0.0)
            sums += (
                xs.to(tl.float32) * tl.load(a + first * size + begin + i, mask=some, other=0.0).to(tl.float32)[None, :]
            )
        thin = tl.sum(sums, 1)
        bs = tl.load(b + first * out + column, mask=inside, other=0.0).to(tl.float32)
        total += thin[:, None] * bs[None, :]
    else:
        # tl.dot wants 16 or more
        PADDED: tl.constexpr = 16
        q = tl.arange(0, PADDED)
        thin = tl.zeros((ROWS, PADDED), tl.float32)
        for begin in range(0, size, SIZE):
            some = begin + i < size
            xs = tl.load(x + row * x_stride + (begin + i)[None, :], mask=there & some[None, :], other=0.0)
            factor = (first + q)[None, :] * size + (begin + i)[:, None]
            thin = tl.dot(
                xs,
                tl.load(a + factor, mask=(q < RANK)[None, :] & some[:, None], other=0.0),
                thin,
                input_precision="ieee",
            )
        bs = tl.load(
            b + (first + q)[:, None] * out + column[None, :], mask=(q < RANK)[:, None] & inside[None, :], other=0.0
        )
        total = tl.dot(thin.to(bs.dtype), bs, total, input_precision="ieee")
    tl.store(at, total.to(y.dtype.element_ty), mask=mask)


def configuration(rank: int, out: int, element_size: int) -> tuple[tuple[int, int, int], dict[str, int]]:
    """(ROWS, SIZE, OUT) and the launch options, for x of so many bytes an element. The fastest of ten on an H200; 65 KB
    of shared memory at most, which smaller GPUs have, too."""
    if rank == 1:
        return (16, 512, min(1024, max(128, triton.next_power_of_2(out)))), {"num_warps": 8, "num_stages": 2}
    return (16, 1024 // element_size, 256), {"num_warps": 4, "num_stages": 3}


def add_thin_product(
    y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None
) -> None:
    """y += (x A^T) B + bias, in place, for tensors as in add_thin_product_kernel, on one device.

    x, a and b have one dtype; y and the bias may have another. The rank is 16 at most."""
    (members, rank, size), out = a.shape, b.shape[2]
    rows = len(x) // members
    tile, options = configuration(rank, out, x.element_size())
    blocks = triton.cdiv(rows, tile[0])
    if not blocks:
        return
    given = y, x, a, b, y if bias is None else bias, rows, size, out, x.stride(0), blocks, rank, bias is not None
    with torch.cuda.device_of(y):
        add_thin_product_kernel[(members * blocks, triton.cdiv(out, tile[2]))](*given, *tile, **options)
