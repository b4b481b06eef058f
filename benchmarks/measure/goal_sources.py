"""Where the value of a goal comes from: measured rows, and what is computed from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from .ledger import OUTCOMES
from .record import Row

OURS = ("reference", "triton", "cuda")


@dataclass(frozen=True)
class Found:
    """What the rows give for a goal: the value, in words what it was made of, and its spread if it was kept."""

    value: float
    detail: str
    spread: tuple[float, float] | None = None


class Rows:
    """Rows by what they measure; of several, the latest. dtype "": whichever was measured last, of a shape that has
    one."""

    def __init__(self, rows: Iterable[Row]):
        self._values: dict[tuple[str, ...], float] = {}
        self._reasons: dict[tuple[str, ...], str] = {}
        for r in sorted(rows, key=lambda r: r.date):
            for dtype in ("", r.dtype):
                self._values[r.op, r.backend, r.shape, r.metric, dtype] = r.value
                if r.metric in OUTCOMES:
                    fine = r.metric in ("timed", "checked")
                    self._reasons[r.op, r.backend, r.shape, dtype] = "" if fine else f"{r.metric}: {r.note}"

    def get(self, op: str, backend: str, shape: str, metric: str, dtype: str = "") -> float | None:
        return self._values.get((op, backend, shape, metric, dtype))

    def best(
        self, op: str, shape: str, metric: str, dtype: str = "", *, largest: bool = False
    ) -> tuple[float, str] | None:
        """(value, backend) of the best of our backends."""
        found = [(v, b) for b in OURS if (v := self.get(op, b, shape, metric, dtype)) is not None]
        return (max(found) if largest else min(found)) if found else None

    def reason(self, op: str, backend: str, shape: str, dtype: str = "") -> str:
        """Why there are no rows, if that was recorded."""
        return self._reasons.get((op, backend, shape, dtype), "")


# Rows -> what they give, or in words why they give nothing.
Source = Callable[[Rows], Found | str]


def share(op: str, direction: str, shape: str, dtype: str) -> Source:
    """Bytes that must move, over time, as a share of the copy bandwidth of the same run."""

    def source(rows: Rows) -> Found | str:
        best = rows.best(f"{op}/{direction}", shape, "copy_share", dtype, largest=True)
        return _missing(rows, op, OURS, shape, dtype) if best is None else Found(best[0], f"backend {best[1]}")

    return source


def speedup(op: str, direction: str, shape: str, dtype: str, peer: str, *, replayed: bool = False) -> Source:
    """Time of the peer over time of the fastest of our backends, both eager or both replayed from a CUDA graph."""
    metric = "graph_time_p50" if replayed else "time_p50"

    def source(rows: Rows) -> Found | str:
        best = rows.best(f"{op}/{direction}", shape, metric, dtype)
        other = rows.get(f"{op}/{direction}", peer, shape, metric, dtype)
        if best is None:
            return _missing(rows, op, OURS, shape, dtype)
        if other is None:
            return _missing(rows, op, (peer,), shape, dtype)
        return Found(other / best[0], f"{best[1]} {best[0]:.4g} us, {peer} {other:.4g} us")

    return source


def count(op: str, direction: str, shape: str, metric: str) -> Source:
    """The least of a metric over the kernel backends."""

    def source(rows: Rows) -> Found | str:
        found = [(v, b) for b in OURS[1:] if (v := rows.get(f"{op}/{direction}", b, shape, metric)) is not None]
        return Found(min(found)[0], f"backend {min(found)[1]}") if found else _missing(rows, op, OURS[1:], shape)

    return source


def memory_ratio(op: str, shape: str, peer: str) -> Source:
    """Peak memory of the leanest of our backends over the peer's, forward and backward."""

    def source(rows: Rows) -> Found | str:
        best, other = rows.best(f"{op}/both", shape, "peak_memory"), rows.get(f"{op}/both", peer, shape, "peak_memory")
        if best is None or other is None:
            return _missing(rows, op, OURS if best is None else (peer,), shape)
        return Found(best[0] / other, f"{best[1]} {best[0]:.4g} MiB, {peer} {other:.4g} MiB")

    return source


def step_ratio(shape: str, mode: str) -> Source:
    """AdaMix step over the plain adapter's step, in one mode."""

    def source(rows: Rows) -> Found | str:
        best = rows.best(f"step/adamix/{mode}", shape, "time_p50")
        other = rows.get(f"step/plain_adapter/{mode}", "torch", shape, "time_p50")
        if best is None:
            return _missing(rows, f"step/adamix/{mode}", OURS, shape)
        if other is None:
            return _missing(rows, f"step/plain_adapter/{mode}", ("torch",), shape)
        return Found(best[0] / other, f"{best[1]} {best[0]:.4g} ms, plain {other:.4g} ms")

    return source


def step_speedup(shape: str) -> Source:
    """The published way's step, which is eager alone, over the AdaMix step in its fastest mode."""

    def source(rows: Rows) -> Found | str:
        modes = {m: rows.best(f"step/adamix/{m}", shape, "time_p50") for m in ("eager", "compile", "graph")}
        found = [(best[0], f"{best[1]} {mode}") for mode, best in modes.items() if best is not None]
        other = rows.get("step/original/eager", "torch", shape, "time_p50")
        if not found:
            return _missing(rows, "step/adamix/eager", OURS, shape)
        if other is None:
            return _missing(rows, "step/original/eager", ("torch",), shape)
        each = ", ".join(f"{name} {other / time:.2f}x" for time, name in found)
        return Found(other / min(found)[0], f"original {other:.4g} ms; {each}")

    return source


def serving_ratio(ours: str, other: str, shape: str) -> Source:
    """Time of one model over another ("inference/base"), replayed where both are, else eager."""

    def source(rows: Rows) -> Found | str:
        for metric, how in (("graph_time_p50", "replayed"), ("time_p50", "eager")):
            timed = {name: rows.get(ours, name, shape, metric) for name in ("torch", *OURS)}
            found = [(value, name) for name, value in timed.items() if value is not None]
            peer = rows.get(other, "torch", shape, metric)
            if found and peer is not None:
                time, name = min(found)
                return Found(time / peer, f"{name} {time:.4g} ms, {other.partition('/')[2]} {peer:.4g} ms, {how}")
        return _missing(rows, ours, ("torch", *OURS), shape)

    return source


def cpu_ratio(shape: str, other: str) -> Source:
    """Median of the per-round ratios, with its 20th and 80th percentile."""

    def source(rows: Rows) -> Found | str:
        low, middle, high = (
            rows.get("step/adamix", "reference", shape, f"ratio_{p} to step/{other}") for p in ("p20", "p50", "p80")
        )
        return "" if middle is None else Found(middle, f"20th to 80th percentile {low:.2f} to {high:.2f}", (low, high))

    return source


def _missing(rows: Rows, op: str, names: Sequence[str], shape: str, dtype: str = "") -> str:
    reasons = {name: rows.reason(op, name, shape, dtype) for name in names}
    return "; ".join(f"{name} {reason}" for name, reason in reasons.items() if reason)
