"""The mixtures by a device's clock: in a tiny size on the CPU, and the rows of a GPU with the clock replaced."""

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks import run, sizes
from benchmarks.measure import clock, record
from benchmarks.measure.ledger import Item, Ledger
from benchmarks.mixtures import device, layer

CPU = torch.device("cpu")
MOLA = {"MoLA top-2": device.configurations()["MoLA top-2"]}
OUTCOMES = ("timed", "checked", "refused", "absent", "failed")


def outcomes(rows):
    return {(r.shape.partition(" 2x")[0], r.backend): r.metric for r in rows if r.metric in OUTCOMES}


def test_every_way_is_checked_and_timed():
    ledger = Ledger()
    for size in sizes.MIXTURE["smoke"]:
        device.measure_layer(size, CPU, ledger, smoke=True, check_only=False)
    found = outcomes(ledger.rows)
    assert set(found.values()) <= {"timed", "absent"}
    assert {kind for (kind, name), what in found.items() if name == "reference" and what == "timed"} == set(layer.KINDS)
    assert {(kind, peer) for kind, peers in layer.PEERS.items() for peer in peers} <= set(found)
    assert found["dense", "loop"] == found["top-2", "einsum"] == "timed"
    times = {(r.op, r.backend) for r in ledger.rows if r.metric == "time_p50" and r.unit == "us" and r.value > 0}
    assert times >= {("mixture/forward", "reference"), ("mixture/both", "reference"), ("mixture/both", "loop")}


def test_a_wrong_way_is_not_timed_and_an_absent_one_is_told(monkeypatch):
    monkeypatch.setattr(layer, "einsum", lambda one: 1.001 * layer.python_loop(one))
    monkeypatch.delattr(torch, "_grouped_mm", raising=False)
    ledger = Ledger()
    device.measure_layer(sizes.MIXTURE["smoke"][0], CPU, ledger, smoke=True, check_only=True)
    found = outcomes(ledger.rows)
    assert (found["dense", "einsum"], found["dense", "grouped_mm"], found["dense", "loop"]) == (
        "refused", "absent", "checked")  # fmt: skip
    assert not [r for r in ledger.rows if r.metric.startswith("time")]


def test_the_decoded_token_and_the_command(monkeypatch, tmp_path):
    monkeypatch.setattr(device, "configurations", lambda: MOLA)
    monkeypatch.setattr(sizes, "MIXTURE", {**sizes.MIXTURE, "smoke": sizes.MIXTURE["smoke"][2:]})
    path = tmp_path / "rows.csv"
    assert run.main(["mixtures", "--size", "smoke", "--device", "cpu", "--check-only", "--out", str(path)]) == 0
    found = {(r.op, r.backend): r.metric for r in record.read(path) if r.metric in OUTCOMES}
    assert found["decode/base", "torch"] == found["decode/MoLA top-2", "reference"] == "checked"
    assert found["mixture", "reference"] == "checked"


@pytest.mark.parametrize("broken", [False, True])
def test_the_rows_of_a_gpu(broken, monkeypatch):
    def replayed(call, sets, effort):
        if broken:
            raise RuntimeError("operation not permitted when stream is capturing")
        return [2e-6 * sets]

    for name, value in (("eager_seconds", [4e-6]), ("host_seconds", 3e-6), ("peak_bytes", 2**21), ("launches", 2)):
        monkeypatch.setattr(clock, name, lambda *_, value=value, **__: value)
    asked = []
    monkeypatch.setattr(clock, "graph_seconds", replayed)
    monkeypatch.setattr(clock, "require_working", asked.append)
    gpu = torch.device("cuda")
    item = Item("mixture", "cuda", "1", "bfloat16")
    rows = device._timed(item, "mixture/both", lambda k: None, 3, gpu, clock.SMOKE, True)
    found = {r.metric: pytest.approx(r.value) for r in rows}
    assert found["time_p50"] == 4
    assert (found["host_time"], found["peak_memory"], found["launches"]) == (3, 2, 2)
    assert found.get("graph_time_p50") == (None if broken else 6)
    assert ("graph_failed" in found) == broken
    assert asked == [gpu] * broken
    assert {r.op for r in rows} == {"mixture/both"}
