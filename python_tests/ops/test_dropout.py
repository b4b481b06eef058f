"""The stateless dropout mask: its exact bits and its statistics."""

import math

import pytest
import torch

from adamix_kernels.ops._dropout import dropout, keep_mask

WORD = 0xFFFFFFFF


def _seed(value):
    return torch.tensor(value, dtype=torch.int64)


def _fmix32(h):
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & WORD
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & WORD
    return h ^ (h >> 16)


def _keeps(seed, row, col, p):
    """The documented formula in Python integers."""
    seed, row = seed % 2**64, row % 2**64
    a = _fmix32(_fmix32(((seed & WORD) + 0x9E3779B9) & WORD) ^ (seed >> 32))
    b = _fmix32(_fmix32(((seed >> 32) + 0x7F4A7C15) & WORD) ^ (seed & WORD))
    key0 = _fmix32(_fmix32(a ^ (row & WORD)) ^ (row >> 32))
    key1 = _fmix32((_fmix32((b + (row & WORD)) & WORD) + (row >> 32)) & WORD)
    t = (col * 0x9E3779B9) & WORD
    h = ((key0 | 1) * (t ^ (t * t | 1)) + key1) & WORD
    return h >= math.floor(p * 2**32)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 0x0123456789ABCDEF])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_mask_is_the_documented_formula(seed, p):
    mask = keep_mask(_seed(seed), 13, 37, p)
    assert mask.shape == (13, 37)
    assert mask.dtype == torch.bool
    assert mask.tolist() == [[_keeps(seed, r, c, p) for c in range(37)] for r in range(13)]


def test_frozen_bits():
    """These bits are a contract with other backends and with saved runs; they may never change."""
    mask = keep_mask(_seed(42), 4, 16, 0.5)
    words = [sum(int(keep) << c for c, keep in enumerate(row)) for row in mask.tolist()]
    assert words == [0x5C5C, 0x925C, 0x9DD1, 0x6A3D]


def test_rows_and_columns_are_a_prefix():
    """An element's fate depends on (seed, row, column) alone, not on the size of the mask."""
    big = keep_mask(_seed(3), 50, 70, 0.3)
    assert torch.equal(keep_mask(_seed(3), 20, 33, 0.3), big[:20, :33])


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("seed", [0, 7, -5])
def test_keep_rate(p, seed):
    mask = keep_mask(_seed(seed), 1000, 768, p).double()
    sigma = math.sqrt(p * (1 - p))
    assert abs(mask.mean() - (1 - p)) < 4 * sigma / math.sqrt(mask.numel())
    # The worst of n rows or columns may stray further: 6 sigma has odds below 1e-5 here.
    assert (mask.mean(1) - (1 - p)).abs().max() < 6 * sigma / math.sqrt(768) + 1e-3
    assert (mask.mean(0) - (1 - p)).abs().max() < 6 * sigma / math.sqrt(1000) + 1e-3


def _standardised(mask):
    return mask.double() * 2 - 1  # p = 0.5: mean 0, variance 1


def _assert_uncorrelated(vectors):
    """No pair of the rows of [n, length] correlates beyond chance, and all pairs together look like chance."""
    n, length = vectors.shape
    z = (vectors @ vectors.t() / math.sqrt(length))[torch.triu(torch.ones(n, n, dtype=torch.bool), 1)]
    assert z.abs().max() < 6
    assert abs(z.mean()) < 5 / math.sqrt(z.numel())
    assert abs(z.square().mean() - 1) < 5 * math.sqrt(2 / z.numel())


@pytest.mark.parametrize("seed", [0, 1, 123456789])
def test_rows_and_columns_are_uncorrelated(seed):
    signs = _standardised(keep_mask(_seed(seed), 512, 512, 0.5))
    _assert_uncorrelated(signs)
    _assert_uncorrelated(signs.t())


@pytest.mark.parametrize("step", [1, 2**31, 2**32])
def test_seeds_are_uncorrelated(step):
    masks = torch.stack([_standardised(keep_mask(_seed(i * step), 32, 64, 0.5)).flatten() for i in range(64)])
    _assert_uncorrelated(masks)


@pytest.mark.parametrize("lag", [1, 2, 16, 64, 128])
def test_neighbours_are_uncorrelated(lag):
    signs = _standardised(keep_mask(_seed(9), 1024, 512, 0.5))
    for a, b in ((signs[lag:], signs[:-lag]), (signs[:, lag:], signs[:, :-lag])):
        assert abs((a * b).mean()) < 5 / math.sqrt(a.numel())


@pytest.mark.parametrize("lags", [(1, 2), (2, 4), (8, 16), (1, 2, 3), (1, 16, 17)])
def test_columns_of_a_regular_pattern_are_dropped_independently(lags):
    """Columns in arithmetic progression, and two pairs of equal distance: what a linear hash of the column ties."""
    p, rows, last = 0.1, 4096, max(lags)
    mask = (keep_mask(_seed(4), rows, 512, p).double() - (1 - p)) / math.sqrt(p * (1 - p))
    product = mask[:, : 512 - last]
    for lag in lags:
        product = product * mask[:, lag : 512 - last + lag]
    z = product.sum(0) / math.sqrt(rows)
    assert z.abs().max() < 7
    assert abs(z.square().mean() - 1) < 6 * math.sqrt(2 / z.numel())


def test_different_seeds_differ():
    masks = {tuple(keep_mask(_seed(s), 4, 32, 0.5).flatten().tolist()) for s in range(200)}
    assert len(masks) == 200


@pytest.mark.parametrize(("rows", "cols"), [(0, 8), (8, 0), (0, 0)])
def test_empty(rows, cols):
    assert keep_mask(_seed(0), rows, cols, 0.5).shape == (rows, cols)


def test_extreme_probabilities():
    assert keep_mask(_seed(0), 100, 100, 2.0**-40).all()
    assert not keep_mask(_seed(0), 100, 100, 1 - 2.0**-53).any()


def test_dropped_elements_become_zero_whatever_they_held():
    keep = keep_mask(_seed(1), 6, 8, 0.5)
    x = torch.full((2, 3, 8), float("inf"))
    x[0] = float("nan")
    out = dropout(x, keep, 0.5)
    assert (out.view(6, 8)[~keep] == 0).all()
    assert not out.view(6, 8)[keep].isfinite().any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_kept_elements_are_scaled(dtype):
    keep = keep_mask(_seed(1), 6, 8, 0.25)
    out = dropout(torch.full((2, 3, 8), 3.0, dtype=dtype), keep, 0.25)
    assert out.dtype == dtype
    assert torch.equal(out.view(6, 8)[keep], torch.full((int(keep.sum()),), 4.0, dtype=dtype))


def test_compiled_mask_has_the_same_bits():
    torch._dynamo.reset()
    compiled = torch.compile(keep_mask, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(_seed(77), 33, 65, 0.3), keep_mask(_seed(77), 33, 65, 0.3))


def test_autocast_changes_nothing():
    with torch.autocast("cpu", torch.bfloat16):
        mask = keep_mask(_seed(5), 16, 16, 0.5)
    assert torch.equal(mask, keep_mask(_seed(5), 16, 16, 0.5))
