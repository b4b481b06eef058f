"""How many row pairs linear_adamix_loss takes at a time: enough for the products, few enough for the memory."""

from __future__ import annotations

import functools

import torch

# A GPU's matrix units do so many operations in the time of one byte from its memory (V100 120, A100 150, H200 180,
# H100 240), and so many in a second (A100 2.5e14, H200 8e14).
_BALANCE, _RATE = 240, 8e14
# Seconds of a chunk's launches beside the products, and the share of the products' time that these may cost, or a pass
# over the gradient of a trained head.
_LAUNCHES, _SHARE = 1e-5, 1 / 16
# The logits of a chunk: on a CPU so many bytes, in float32; on a GPU a part of its memory.
_CPU_BYTES, _GPU_PART = 64 * 2**20, 256


def pairs_a_chunk(
    pairs: int,
    vocab: int,
    width: int,
    element_bytes: int,
    need_weight: bool,
    device: torch.device,
    inside: bool = False,
) -> int:
    """Row pairs a chunk, at least one, the same for all chunks but the last.

    inside: whether a product adds to the head's gradient itself.
    """
    if device.type == "cpu":
        most = _CPU_BYTES // (8 * vocab)
    else:
        most = min(
            _memory(device) // _GPU_PART // (2 * vocab * element_bytes), wanted(vocab, width, need_weight, inside)
        )
    # Multiples of 8 let both passes' rows start alike in 16 bytes, also where vocab is odd.
    most = max(1, most - most % 8 if most > 8 else most)
    if device.type == "cpu" or pairs <= most:
        return most
    even = -(-pairs // -(-pairs // most))
    return min(most, -(-even // 8) * 8)


def wanted(vocab: int, width: int, need_weight: bool, inside: bool = False) -> int:
    """Row pairs that keep a GPU's products at their speed.

    With R rows of both passes, each product reads the head once a chunk, which takes the time of its arithmetic where
    R width / (R + width) is the balance: twice the rows that make it so. A chunk's launches take at most the share of
    two products of 2 R width vocab operations. Adding to the head's gradient, a pass of 12 bytes an element, takes at
    most twice the share of three; where the product adds, the sum's 8 bytes take half the time of its arithmetic.
    `python -m benchmarks.linear_share` has the chunks that a model with an L2 would take.
    """
    reads = 2 * _BALANCE * width / (width - _BALANCE) if width > 2 * _BALANCE else 4 * _BALANCE
    launches = _LAUNCHES / _SHARE * _RATE / (4 * width * vocab)
    adds = 8 * _BALANCE if inside else 12 * _BALANCE / (2 * _SHARE) / 6
    return int(max(reads, launches, adds if need_weight else 0) / 2) + 1


@functools.cache
def _memory(device: torch.device) -> int:
    """Bytes of the device; of a device that is no GPU of CUDA, those of a small one."""
    if device.type != "cuda":
        return 16 * 2**30
    return int(torch.cuda.get_device_properties(device).total_memory)
