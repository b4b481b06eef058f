"""The README's table of what works where, and docs/auto.md's of devices: from records, never typed."""

import json

import pytest

from adamix_kernels._auto import SHAPES
from adamix_kernels.verifying.machine import DTYPES
from benchmarks import works

TEXT = "before\n<!-- what works where, written by `python -m benchmarks.works --write`: begin -->\nold\n" + (
    "<!-- what works where: end -->\nafter\n"
)


def made(backend, gpu, stand_in=None, wrong=0):
    """A record in which `wrong` kernels of merging are wrong."""
    verdicts = [
        {"op": op, "backend": backend, "dtype": dtype, "shape": shape, "gpu": gpu, "state": "right", "why": "",
         "when": "2026-01-02T03:04:05+00:00", "seconds": 1.0, "cases": 3}
        for op, shapes in SHAPES.items() for shape in shapes for dtype in DTYPES
    ]  # fmt: skip
    for verdict in [v for v in verdicts if v["op"] == "merge"][:wrong]:
        verdict["state"] = "wrong"
    versions = {"torch": "2.13.0", "triton": "3.6.0"}
    return {"stand_in": stand_in, "commit": "0", "verdicts": verdicts, "environment": {"versions": versions}}


def test_a_cell_says_what_the_records_show():
    records = [made("triton", "an interpreter", "interpreted"), made("triton", "PTX", "ptx80", wrong=1)]
    assert works.cell("routed_lora", "triton", records, [80, 90]) == (
        "compiled for sm_80, 90; interpreted; sm_80 code run on a CPU; run on no GPU yet"
    )
    assert "sm_80 code run on a CPU: 2 of 3 right" in works.cell("merge", "triton", records, [])
    assert works.cell("merge", "cuda", records, []) == "run on no GPU yet"


def test_a_gpu_is_named_once_somebody_ran_it_there():
    records = [made("cuda", "NVIDIA H100"), made("cuda", "NVIDIA A100", wrong=2)]
    assert works.cell("routed_adapter", "cuda", records, [90]) == (
        "compiled for sm_90; run on NVIDIA H100, NVIDIA A100"
    )
    assert works.cell("merge", "cuda", records, []) == "run on NVIDIA H100, NVIDIA A100: 1 of 3 right"
    assert "| NVIDIA A100 | cuda | 40 | 2 | 2.13.0, 3.6.0 | 2026-01-02 |" in works.devices(records)


def test_every_kernel_counts_for_what_is_compiled():
    found = works.compiled()
    assert set(found) == {(op, backend) for op in SHAPES for backend in ("triton", "cuda")}
    assert all(80 in targets and 90 in targets for targets in found.values())
    assert 70 in found["merge", "cuda"]
    assert 70 not in found["merge", "triton"]


def test_a_part_that_is_run_again_leaves_the_rest(tmp_path, monkeypatch):
    monkeypatch.setattr(works, "VERIFIED", tmp_path)
    (tmp_path / "ptx80.json").write_text(json.dumps(made("triton", "PTX", "ptx80", wrong=2)))
    again = made("triton", "PTX", "ptx80")
    again["verdicts"] = [v for v in again["verdicts"] if v["op"] == "merge"]
    again["commit"] = "1"
    monkeypatch.setattr(works, "run", lambda *_: again)
    assert works.main(["--run", "ptx80", "--ops", "merge"]) == 0
    (record,) = works.kept()
    assert record["commit"] == "0, 1"
    assert len(record["verdicts"]) == len(made("triton", "PTX")["verdicts"])
    assert all(verdict["state"] == "right" for verdict in record["verdicts"])
    again["environment"] = {"versions": {"torch": "2.14.0", "triton": "3.6.0"}}
    works.main(["--run", "ptx80", "--ops", "merge"])
    assert works.kept() == [again]


def test_a_readme_is_written_between_its_markers(tmp_path, monkeypatch):
    monkeypatch.setattr(works, "VERIFIED", tmp_path)
    (tmp_path / "x.json").write_text(json.dumps(made("cuda", "NVIDIA H100")))
    written = works.readme(TEXT)
    assert written.startswith("before\n<!--")
    assert written.endswith("<!-- what works where: end -->\nafter\n")
    assert "NVIDIA H100" in written
    assert works.readme(written) == written
    with pytest.raises(ValueError, match="got no markers"):
        works.readme("before\nafter\n")


def test_the_page_is_what_the_records_give():
    text = works.PAGE.read_text()
    assert works.page(text) == text, works.COMMAND
    kinds = {one["stand_in"] for one in works.kept()}
    assert kinds >= {"csrc", "ptx80"}
    for one in works.kept():
        assert all(verdict["state"] == "right" for verdict in one["verdicts"]), one["stand_in"]
