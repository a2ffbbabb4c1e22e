"""Numbers in 8 bits with a scale for each block: how bitsandbytes keeps optimizer states (Dettmers et al. 2021).

A block of 256 elements is divided by its largest magnitude, and each element becomes the index of the nearest entry of
a table of 256 numbers in [-1, 1] (or [0, 1]), dense near 0. Kernels of bitsandbytes encode and decode within an
optimizer's step; what stands here turns states into numbers that any optimizer understands, and back.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

BLOCK = 256
"""Elements that share a scale: what bitsandbytes' kernels are compiled for."""
_CHUNK = 2**14  # blocks that are encoded at a time: 4M elements, whose indices take 32 MB


@lru_cache
def table(signed: bool, device: torch.device) -> Tensor:
    """The 256 numbers that codes stand for, ascending, (256,): bitsandbytes' dynamic map.

    A table is the same tensor for all that use it: states hold none of their own.
    """
    from bitsandbytes.functional import create_dynamic_map

    numbers: Tensor = create_dynamic_map(signed=signed).to(device)  # type: ignore[no-untyped-call]
    return numbers


def count_blocks(elements: int) -> int:
    """Scales that so many elements take; the last block may be shorter."""
    return -(-elements // BLOCK)


def decode(codes: Tensor, scales: Tensor, numbers: Tensor) -> Tensor:
    """The float32 numbers that codes (any shape, uint8) with scales (blocks,) stand for."""
    from bitsandbytes.functional import dequantize_blockwise

    values: Tensor = dequantize_blockwise(codes, absmax=scales, code=numbers, blocksize=BLOCK)
    return values


def encode(values: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (as ``values``, uint8) and scales (blocks,) of float32 numbers.

    What :func:`decode` made of codes with the same blocks comes back to the bit. That takes more than the largest
    magnitude for scale: the signed table reaches from -0.993 to 1, so where a block's largest magnitude was a negative
    number, it has shrunk. The scale is then among the few floats next to that number / -0.993, and the one under which
    all of the block's numbers are in the table is right, or as good.
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
    """Codes (blocks, 256) and scales (blocks,)."""
    largest = blocks.abs().amax(1)
    codes, exact = _nearest(blocks, largest, numbers)
    scales = largest.clone()
    if numbers[0] < 0 and not bool(exact.all()):
        candidate = blocks.amin(1) / numbers[0]
        for _ in range(2):  # rounding twice, of the product and of this quotient, is two floats at most
            candidate = torch.nextafter(candidate, torch.zeros_like(candidate))
        for _ in range(5):
            others, right = _nearest(blocks, candidate, numbers)
            right &= ~exact
            codes[right], scales[right] = others[right], candidate[right]
            exact |= right
            candidate = torch.nextafter(candidate, torch.full_like(candidate, torch.inf))
    return codes, scales


def _nearest(blocks: Tensor, scales: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest codes, and for each block whether they stand for exactly its numbers."""
    middles = (numbers[1:] + numbers[:-1]) / 2
    scaled = torch.where(scales[:, None] > 0, blocks / scales[:, None], 0)
    codes = torch.bucketize(scaled, middles)
    exact = (numbers[codes] * scales[:, None] == blocks).all(1)
    return codes.to(torch.uint8), exact
