"""docs/gates.md, the routers' examples and the presets' run as they are printed; the benchmark in a tiny size."""

import copy
import doctest
import inspect
from pathlib import Path
from unittest import mock

import pytest
import tiny
import torch

from adamix_kernels import AdaMixConfig, routing
from adamix_kernels.routing import linear
from benchmarks import mixtures
from benchmarks.measure import record

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


@pytest.mark.parametrize("top_k", mixtures.KINDS.values())
def test_every_way_of_the_benchmark_computes_the_same(top_k):
    layer = mixtures.Layer(2, 5, 16, top_k)
    found = mixtures.ways(layer)
    assert {"adamix", "loop", "einsum"} <= set(found)
    assert [name for name, way in found.items() if mixtures._wrong(way, layer)] == []
    given = [*layer.leaves(), *layer.base.parameters()]
    kept = {name: mixtures.kept_bytes(lambda w=way: w(layer), given) for name, way in found.items()}
    assert kept["adamix"] == min(kept.values())
    calls = {name: mixtures.calls_of(lambda w=way: w(layer)) for name, way in found.items()}
    assert calls["adamix"] == min(calls.values())
    # Between two timed backwards every gradient is dropped: none pays for adding one to that of the last.
    before = {id(leaf) for leaf in layer.leaves()}
    for name in ("loop", "peft x-lora"):
        if name in found:
            found[name](layer).sum().backward()
            assert all(factor.grad is not None for pair in layer.each for factor in pair), name
            assert {id(factor) for pair in layer.each for factor in pair} < before
            for leaf in layer.leaves():
                leaf.grad = None
    with torch.no_grad():
        layer.gates.mul_(0)
    assert mixtures._wrong(lambda one: one.x, layer)


def test_the_calls_of_a_decoded_token_that_the_page_tells():
    """With a router as one op, as where kernels serve, and on the reference."""
    page, calls = PAGE.read_text(encoding="utf-8"), {}
    ids = torch.randint(0, 128, (1, 1))
    for name, config in {"base": None, **mixtures.configurations()}.items():
        model = mixtures.decoder(config, 32)
        for kernels in (False, True):
            with torch.no_grad(), mock.patch.object(linear, "by_kernel", return_value=kernels):
                calls[name, kernels] = mixtures.calls_of(lambda model=model: model(input_ids=ids, use_cache=True))
    base = calls["base", True]
    fused = {calls[name, True] - base for name in mixtures.configurations()}
    assert fused == {96}  # a router and a gated call for each of 48 layers
    assert f"{(881 + 96)} ({(881 + 96) / 881:.3f} of the base)" in page
    for name, words in (("LoRAMoE", "1,025 (1.163)"), ("MoLA top-2", "1,073 (1.218)")):
        more = calls[name, False] - base
        assert f"{881 + more:,} ({(881 + more) / 881:.3f})" == words
        assert words in page


def test_the_page_has_the_committed_rows():
    rows = record.read(mixtures.TABLE)
    assert mixtures.table(rows) in PAGE.read_text(encoding="utf-8")
    assert {row.backend for row in rows} >= {"adamix", "loop", "einsum", "grouped_mm", "peft x-lora"}
    assert all(row.commit and row.torch for row in rows)
