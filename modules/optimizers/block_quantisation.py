"""8-bit numbers with a scale per block, bitsandbytes' format of optimizer states (Dettmers et al. 2021).

A block of 256 elements is divided by its largest magnitude, and each element becomes the index of the nearest entry in
a table of 256 numbers in [-1, 1] (or [0, 1]), dense near 0. bitsandbytes' kernels encode and decode within an
optimizer's step; this file converts states to plain numbers that any optimizer understands, and back.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

BLOCK = 256
"""Number of elements that share a scale; bitsandbytes' kernels are compiled for it."""
_CHUNK = 2**14  # number of blocks to encode at a time: 4M elements, whose indices take 32 MB


@lru_cache
def table(signed: bool, device: torch.device) -> Tensor:
    """Return the 256 numbers that codes stand for, ascending, (256,): bitsandbytes' dynamic map.

    All states share one tensor per table.
    """
    from bitsandbytes.functional import create_dynamic_map

    numbers: Tensor = create_dynamic_map(signed=signed).to(device)  # type: ignore[no-untyped-call]
    return numbers


def count_blocks(elements: int) -> int:
    """Return the number of scales for a number of elements; the last block may be shorter."""
    return -(-elements // BLOCK)


def decode(codes: Tensor, scales: Tensor, numbers: Tensor) -> Tensor:
    """Return the float32 numbers that codes (any shape, uint8) with scales (blocks,) stand for."""
    from bitsandbytes.functional import dequantize_blockwise

    values: Tensor = dequantize_blockwise(codes, absmax=scales, code=numbers, blocksize=BLOCK)
    return values


def encode(values: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes (shaped like ``values``, uint8) and scales (blocks,) of float32 numbers.

    The result of :func:`decode` is encoded exactly if the blocks are the same. The largest magnitude as the scale is
    not enough for that: the signed table ranges from -0.993 to 1, so a block's largest magnitude has shrunk if it was
    negative. The scale is then one of the few floats next to that number / -0.993, and one under which all of the
    block's numbers are in the table is the right one or equivalent.
    """
    flat = values.detach().float().flatten()
    codes = torch.zeros(count_blocks(flat.numel()) * BLOCK, dtype=torch.uint8, device=flat.device)
    scales = torch.zeros(count_blocks(flat.numel()), device=flat.device)
    for begin in range(0, len(scales), _CHUNK):
        part = flat[begin * BLOCK : (begin + _CHUNK) * BLOCK]
        blocks = torch.zeros(count_blocks(part.numel()), BLOCK, device=flat.device)
        blocks.view(-1)[: part.numel()] = part
        found, scale = _encode_blocks(blocks, numbers)
        codes[begin * BLOCK : (begin + len(blocks)) * BLOCK] = found.flatten()
        scales[begin : begin + len(blocks)] = scale
    return codes[: flat.numel()].view(values.shape), scales


def _encode_blocks(blocks: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes (blocks, 256) and scales (blocks,)."""
    largest = blocks.abs().amax(1)
    codes, exact = _nearest(blocks, largest, numbers)
    scales = largest.clone()
    if numbers[0] < 0 and not bool(exact.all()):
        candidate = blocks.amin(1) / numbers[0]
        for _ in range(2):  # rounding the product and this quotient moves it by two floats at most
            candidate = torch.nextafter(candidate, torch.zeros_like(candidate))
        for _ in range(5):
            others, right = _nearest(blocks, candidate, numbers)
            right &= ~exact
            codes[right], scales[right] = others[right], candidate[right]
            exact |= right
            candidate = torch.nextafter(candidate, torch.full_like(candidate, torch.inf))
    return codes, scales


def _nearest(blocks: Tensor, scales: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Return the nearest codes and, per block, whether they represent its numbers exactly."""
    middles = (numbers[1:] + numbers[:-1]) / 2
    scaled = torch.where(scales[:, None] > 0, blocks / scales[:, None], 0)
    codes = torch.bucketize(scaled, middles)
    exact = (numbers[codes] * scales[:, None] == blocks).all(1)
    return codes.to(torch.uint8), exact
