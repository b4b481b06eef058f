"""docs/gates.md, the routers' examples and the presets' run as they are printed; the benchmark in a tiny size."""

import contextlib
import copy
import dataclasses
import doctest
import inspect
from pathlib import Path
from unittest import mock

import pytest
import tiny
import torch

from adamix_kernels import AdaMixConfig, gate_losses, routing
from adamix_kernels.routing import linear
from benchmarks.measure import record
from benchmarks.mixtures import bench
from benchmarks.mixtures.counted import calls_of, counted, kept_bytes
from benchmarks.mixtures.decoding import as_where_kernels_serve, configurations, decoder
from benchmarks.mixtures.layer import ARROW, KINDS, Layer, ways, wrong

PAGE = Path(__file__).resolve().parents[2] / "docs" / "gates.md"
NAMES = [name for name in routing.__all__ if ">>>" in (inspect.getdoc(getattr(routing, name)) or "")]
PRESETS = ("hydra_lora", "lora_moe", "mola", "smear")


def runs(text, names, name):
    example = doctest.DocTestParser().get_doctest(text, names, name, None, None)
    assert example.examples
    said = []
    assert doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example, out=said.append).failed == 0, "".join(said)


def test_the_page():
    model = tiny.tiny_bert()
    batch = {"input_ids": torch.randint(3, 50, (2, 6)), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    text = PAGE.read_text(encoding="utf-8").replace("```", "")
    runs(text, {"model": copy.deepcopy(model), "batch": batch}, "gates.md")
    assert all(f"AdaMixConfig.{name}()" in text for name in PRESETS)


@pytest.mark.parametrize("name", NAMES)
def test_the_example_of_a_router(name):
    assert {"LinearRouter", "SentenceRouter", "ThresholdRouter", "TaskRouter", "ArrowRouter", "balance_loss"} <= {
        *NAMES
    }
    if name == "Router":
        return  # of the package, with its other names: test_docstrings.py
    torch.manual_seed(0)
    runs(inspect.getdoc(getattr(routing, name)), {"torch": torch}, name)


@pytest.mark.parametrize("name", PRESETS)
def test_the_example_of_a_preset(name):
    runs(inspect.getdoc(getattr(AdaMixConfig, name)), {"AdaMixConfig": AdaMixConfig}, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_every_way_of_the_benchmark_computes_the_same(kind, dtype):
    layer = Layer(2, 5, 16, kind, dtype=dtype)
    found = ways(layer)
    assert set(found) >= ({"adamix"} if kind == ARROW else {"adamix", "loop", "einsum"})
    assert {name: wrong(way, layer, peer=name != "adamix") for name, way in found.items()} == dict.fromkeys(found)
    given = [*layer.leaves(), *layer.base.parameters()]
    kept = {name: kept_bytes(lambda w=way: w(layer), given) for name, way in found.items()}
    assert kept["adamix"] == min(kept.values())
    calls = {name: counted(lambda w=way: w(layer)) for name, way in found.items()}
    assert calls["adamix"].count == min(one.count for one in calls.values())
    assert calls["adamix"].bytes == min(one.bytes for one in calls.values())
    # Between two timed backwards every gradient is dropped: none pays for adding one to that of the last.
    before = {id(leaf) for leaf in layer.leaves()}
    for name in ("loop", "peft x-lora", "peft arrow"):
        if name in found:
            found[name](layer).sum().backward()
            assert all(factor.grad is not None for pair in layer.each for factor in pair), name
            assert {id(factor) for pair in layer.each for factor in pair} < before
            for leaf in layer.leaves():
                leaf.grad = None
    assert "output: errs by" in wrong(lambda one: one.x * 1.0, layer)
    right = found["adamix"]
    assert "gradient of x" in wrong(lambda one: right(one) + (one.x - one.x.detach()), layer)


def test_peft_has_its_own_ways():
    pytest.importorskip("peft.tuners.lora.arrow")
    assert "peft x-lora" in ways(Layer(2, 3, 16, "dense"))
    assert "peft arrow" in ways(Layer(2, 3, 16, ARROW))


def test_the_calls_of_a_decoded_token_that_the_page_tells():
    """With a router and its LoRAs as one op, as where kernels serve, and on the reference."""
    page, calls = PAGE.read_text(encoding="utf-8"), {}
    ids = torch.randint(0, 128, (1, 1))
    for name, config in {"base": None, **configurations()}.items():
        model = decoder(config, 32)
        for kernels in (False, True):
            how = as_where_kernels_serve() if kernels else contextlib.nullcontext()
            with torch.no_grad(), how:
                calls[name, kernels] = calls_of(lambda model=model: model(input_ids=ids, use_cache=True))
    base = calls["base", True]
    fused = {calls[name, True] - base for name in configurations()}
    assert fused == {48}  # a router and its LoRAs for each of 48 layers
    assert f"{(881 + 48)} ({(881 + 48) / 881:.3f} of the base)" in page
    for name, words in (("LoRAMoE", "1,025 (1.163)"), ("MoLA top-2", "1,073 (1.218)")):
        more = calls[name, False] - base
        assert f"{881 + more:,} ({(881 + more) / 881:.3f})" == words
        assert words in page


def calls_of_a_step(config):
    """Of a training step with a mask of padding, where kernels serve."""
    model = decoder(config, 32).train()
    ids, mask = torch.randint(0, 128, (2, 6)), torch.ones(2, 6, dtype=torch.int64)
    mask[1, 4:] = 0

    def step():
        (model(input_ids=ids, attention_mask=mask, labels=ids).loss + gate_losses(model).total).backward()

    with as_where_kernels_serve():
        return calls_of(step)


def test_the_calls_of_a_training_step_that_the_page_tells():
    page, config = PAGE.read_text(encoding="utf-8"), configurations()["LoRAMoE"]
    balanced, bare = (calls_of_a_step(c) for c in (config, dataclasses.replace(config, balance_weight=0.0)))
    share = (balanced - bare) / balanced
    assert f"{balanced:,} calls in all, {balanced - bare} of them for the balance ({share:.0%})" in page


def calls_of_a_router(top_k, balance, z):
    """Of a training forward with a mask, and of its backward, where kernels serve."""
    router = routing.LinearRouter(16, 4, top_k, balance=balance, z=z).train()
    x, mask = torch.randn(2, 5, 16, requires_grad=True), torch.ones(2, 5, dtype=torch.int64)
    with mock.patch.object(linear, "by_kernel", return_value=True):
        forward = calls_of(lambda: router(x, mask))
        gates = router(x, mask).gates
    made = [gates, *(loss for loss in (router.last.balance, router.last.z) if loss is not None)]
    incoming = [torch.ones_like(one) for one in made]
    return forward, calls_of(lambda: torch.autograd.grad(made, [x, router.weight], incoming))


def test_the_calls_of_a_routers_losses_that_the_page_tells():
    page = PAGE.read_text(encoding="utf-8")
    for name, balance, z in (("none", False, False), ("balance", True, False), ("balance and z", True, True)):
        (dense, behind), (best, behind_best) = (calls_of_a_router(top_k, balance, z) for top_k in (None, 2))
        assert behind == behind_best
        assert f"| {name} | {dense} | {best} | {behind - 1} |" in page  # less the router's own


def test_the_page_has_the_committed_rows():
    rows = record.read(bench.TABLE)
    assert bench.table(rows) in PAGE.read_text(encoding="utf-8")
    assert {row.backend for row in rows} >= {"adamix", "loop", "einsum", "grouped_mm", "peft x-lora", "peft arrow"}
    assert all(row.commit and row.torch for row in rows)
