"""Stateless dropout: the mask is a pure function of (seed, row, column), so it is never stored.

The forward, the backward and every backend compute the same bits. Everything below is unsigned 32-bit
arithmetic modulo 2**32; `lo` and `hi` are the halves of a 64-bit value in two's complement.

    fmix32(h): h ^= h >> 16; h *= 0x85EBCA6B; h ^= h >> 13; h *= 0xC2B2AE35; h ^= h >> 16

    seed keys   a    = fmix32(fmix32(lo(seed) + 0x9E3779B9) ^ hi(seed))
                b    = fmix32(fmix32(hi(seed) + 0x7F4A7C15) ^ lo(seed))
    row keys    key0 = fmix32(fmix32(a ^ lo(row)) ^ hi(row))
                key1 = fmix32(fmix32(b + lo(row)) + hi(row))
    column key  t = col * 0x9E3779B9; c = t ^ (t * t | 1)
    element     h = (key0 | 1) * c + key1
                keep iff h >= floor(p * 2**32), unsigned

Keys cost once a row and once a column; an element costs one multiplication with addition and one comparison, in
whatever order a kernel meets it. Both factors are what keeps elements apart: c is a permutation of the columns without
a linear relation among its neighbours, and a row's odd factor and offset map it one to one onto h.

A row is a token counted over all leading axes, row = b * S + s; a column is an input feature. A kept
element is multiplied by 1 / (1 - p), a dropped one becomes zero whatever it held.
"""

from __future__ import annotations

import torch


def keep_mask(seed: torch.Tensor, rows: int, cols: int, p: float) -> torch.Tensor:
    """keep[row, col] = h(seed, row, col) >= floor(p * 2**32): bool [rows, cols] on seed's device.

    seed: int64, 0-dimensional. p: 0 <= p < 1, the probability of dropping. No value is read back.
    """
    row = torch.arange(rows, dtype=torch.int64, device=seed.device).unsqueeze(1)  # [rows, 1]
    row_lo, row_hi = _halves(row)
    seed_lo, seed_hi = _halves(seed)
    a = _fmix32(_fmix32(seed_lo + _signed(0x9E3779B9)) ^ seed_hi)
    b = _fmix32(_fmix32(seed_hi + _signed(0x7F4A7C15)) ^ seed_lo)
    key0 = _fmix32(_fmix32(row_lo ^ a) ^ row_hi)
    key1 = _fmix32(_fmix32(row_lo + b) + row_hi)

    t = torch.arange(cols, dtype=torch.int32, device=seed.device) * _signed(0x9E3779B9)
    h = (key0 | 1) * (t ^ (t * t | 1))  # [rows, cols]
    h += key1
    # Flipping the sign bit turns the unsigned comparison into a signed one.
    h ^= _signed(0x80000000)
    return h >= int(p * 2**32) - 2**31


def dropout(x: torch.Tensor, keep: torch.Tensor, p: float) -> torch.Tensor:
    """keep * x / (1 - p): x [..., K], keep [rows, K] from keep_mask; the derivative is the same function."""
    return torch.where(keep.view(x.shape), x * (1.0 / (1.0 - p)), 0)


def _signed(constant: int) -> int:
    """The int32 with the bits of an unsigned constant; int32 wraps around as uint32 does."""
    return constant - 2**32 if constant >= 2**31 else constant


def _shift(h: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift: torch's is arithmetic for int32."""
    return (h >> bits) & (0xFFFFFFFF >> bits)


def _halves(value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return value.to(torch.int32), (value >> 32).to(torch.int32)


def _fmix32(h: torch.Tensor) -> torch.Tensor:
    """The finaliser of MurmurHash3 (Austin Appleby, public domain)."""
    h = (h ^ _shift(h, 16)) * _signed(0x85EBCA6B)
    h = (h ^ _shift(h, 13)) * _signed(0xC2B2AE35)
    return h ^ _shift(h, 16)
