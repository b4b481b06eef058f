"""`adamix bench gpu-proof`: the GPU tests, the sanitizers and every benchmark, in one command and a fixed time."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from .. import RESULTS, ROOT
from ..measure import goals, record
from . import report as proof_report
from .run import FAILED, TIMED_OUT, Result, run_together
from .stages import groups

NO_GPU = 3
# Seconds between two writings of the partial results.
EVERY = 10.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0; 1 when a stage failed or ran out of time (the report names it); 3 without a GPU."""
    options = _parser().parse_args(arguments)
    if options.budget is None:
        options.budget = 3600.0 if options.smoke else 540.0
    on_gpu = torch.cuda.is_available()
    if not on_gpu and not options.smoke:
        print("gpu-proof: this machine has no CUDA GPU that torch can use, so nothing was run "
              "(--smoke runs every stage in a tiny size on the CPU)", file=sys.stderr)  # fmt: skip
        return NO_GPU
    out = _out_folder(options.out, smoke=options.smoke)
    # What the stages import must not look for a network.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    out.mkdir(parents=True, exist_ok=True)
    (out / "log.txt").unlink(missing_ok=True)
    # Ended from outside, the processes of the stages must end too, and what there is be written.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with tempfile.TemporaryDirectory(prefix="adamix-proof-") as folder:
        proof = _Proof(out, Path(folder), options)
        try:
            proof.run()
        finally:
            proof.write()
    verdicts = proof.verdicts
    met = sum(v.state == "met" for v in verdicts)
    print(f"{met} of {len(verdicts)} goals met; report: {out / 'report.md'}")
    return 1 if any(r.outcome in (FAILED, TIMED_OUT) for r in proof.results) else 0


class _Proof:
    def __init__(self, out: Path, folder: Path, options: argparse.Namespace):
        self.out, self.folder, self.options = out, folder, options
        self.began = self.written = time.monotonic()
        self.results: list[Result] = []
        self.verdicts: list[goals.Verdict] = []

    def run(self) -> None:
        """Every group, in order, its time shared with all that come after it."""
        waiting = groups(self.folder, self.out, smoke=self.options.smoke, skip=self.options.skip)
        while waiting:
            left = self.options.budget - (time.monotonic() - self.began)
            wanted = sum(max((s.seconds for s in group if not s.absent), default=0.0) for group in waiting)
            factor = min(1.0, left / wanted) if wanted else 1.0
            if factor <= 0:
                for stage in waiting.pop(0):
                    self._ended(Result(stage.name, TIMED_OUT, 0.0, "the time of the proof was used up before it"))
                continue
            run_together(waiting.pop(0), factor, self.folder, ROOT, self._ended, self._tick)

    def write(self) -> None:
        """The three files, from what there is so far."""
        facts = record.environment()
        facts = {key: facts[key] for key in ("torch", "triton", "driver", "commit", "date")} | {
            "device": facts["gpu_name"] or facts["cpu_name"] or "CPU",
            "seconds": time.monotonic() - self.began,
            "budget": self.options.budget,
            "environment": next((r.output for r in self.results if r.name == "environment"), ""),
        }
        self.verdicts = proof_report.write(self.out, self.folder, self.results, facts, smoke=self.options.smoke)
        self.written = time.monotonic()

    def _ended(self, result: Result) -> None:
        counted = proof_report.count_outcomes(self.folder / f"{result.name.replace('/', '_')}.csv")
        result.note = "; ".join(filter(None, [counted, result.note]))
        self.results.append(result)
        print(
            f"[{time.monotonic() - self.began:4.0f} s] {result.name}: {result.outcome}"
            + (f" in {result.seconds:.0f} s" if result.seconds else "")
            + (f": {result.note}" if result.note else ""),
            flush=True,
        )
        proof_report.append_log(self.out, result)
        self.write()

    def _tick(self) -> None:
        if time.monotonic() - self.written > EVERY:
            self.write()


def _out_folder(given: str | None, *, smoke: bool) -> Path:
    if given is not None:
        return Path(given).resolve()
    if smoke:
        return Path(tempfile.mkdtemp(prefix="adamix-smoke-"))
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    return RESULTS / name


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="adamix bench gpu-proof",
        description=__doc__,
        epilog="In a copy of the tree without its history, $ADAMIX_COMMIT names the commit that the rows are of.",
    )
    parser.add_argument("--out", help="folder for report.md, results.csv, results.json, log.txt and tune.json "
                        "(default: benchmarks/results/<GPU>; a temporary one for --smoke)")  # fmt: skip
    parser.add_argument("--budget", type=float, help="seconds for everything (default: 540; an hour for --smoke)")
    parser.add_argument("--smoke", action="store_true", help="every stage in a tiny size, also without a GPU")
    parser.add_argument("--skip", nargs="+", default=[], metavar="STAGE",
                        help="leave out stages: tests, check, build, steps, sanitizer, tune, merge, ...")  # fmt: skip
    return parser


if __name__ == "__main__":
    sys.exit(main())
