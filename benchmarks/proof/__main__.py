"""`adamix bench gpu-proof`: the GPU tests, the sanitizers and every benchmark, in one command and a fixed time."""

from __future__ import annotations

import argparse
import contextlib
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
from . import join
from . import report as proof_report
from .run import FAILED, TIMED_OUT, Result, run_together
from .stages import PARTS, groups

NO_GPU = 3
# Seconds between two writings of the partial results.
EVERY = 10.0
# Seconds of everything, or of a part.
_BUDGETS = {None: 900.0, 1: 420.0, 2: 330.0}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0; 1 when a stage failed or ran out of time (the report names it); 3 without a GPU."""
    options = _parser().parse_args(arguments)
    if options.join:
        if options.out is None:
            raise SystemExit("gpu-proof: --join needs --out, the folder that holds the whole")
        verdicts = join.join([Path(folder) for folder in options.join], Path(options.out))
        _tell(verdicts, Path(options.out))
        return 0
    if options.budget is None:
        options.budget = 3600.0 if options.smoke else _BUDGETS[options.part]
    on_gpu = torch.cuda.is_available()
    if not on_gpu and not options.smoke:
        print("gpu-proof: this machine has no CUDA GPU that torch can use, so nothing was run "
              "(--smoke runs every stage in a tiny size on the CPU)", file=sys.stderr)  # fmt: skip
        return NO_GPU
    out = _out_folder(options.out, smoke=options.smoke)
    # What the stages import must not look for a network.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    _caches()
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
    _tell(proof.verdicts, out)
    return 1 if any(r.outcome in (FAILED, TIMED_OUT) for r in proof.results) else 0


def _tell(verdicts: Sequence[goals.Verdict], out: Path) -> None:
    met = sum(v.state == "met" for v in verdicts)
    print(f"{met} of {len(verdicts)} goals met; report: {out / 'report.md'}")


class _Proof:
    def __init__(self, out: Path, folder: Path, options: argparse.Namespace):
        self.out, self.folder, self.options = out, folder, options
        self.began = self.written = time.monotonic()
        self.results: list[Result] = []
        self.verdicts: list[goals.Verdict] = []

    def run(self) -> None:
        """Every group, in order, its time shared with all that come after it."""
        given = self.options
        waiting = groups(
            self.folder, self.out, smoke=given.smoke, skip=given.skip, part=given.part, before=given.before
        )  # fmt: skip
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
        """The three files, from what there is so far; what is in the way is told, and takes no stage's time."""
        try:
            self._write()
        except Exception as error:
            print(f"[{time.monotonic() - self.began:4.0f} s] not written: {type(error).__name__}: {error}", flush=True)
        self.written = time.monotonic()

    def _write(self) -> None:
        facts = record.environment()
        facts = {key: facts[key] for key in ("torch", "triton", "driver", "commit", "date")} | {
            "device": facts["gpu_name"] or facts["cpu_name"] or "CPU",
            "seconds": time.monotonic() - self.began,
            "budget": self.options.budget,
            "environment": next((r.output for r in self.results if r.name == "environment"), ""),
        }
        rows = proof_report.collect(self.folder)
        self.verdicts = proof_report.write(self.out, rows, self.results, facts, smoke=self.options.smoke)

    def _ended(self, result: Result) -> None:
        counted = ""
        with contextlib.suppress(OSError, ValueError):
            counted = proof_report.count_outcomes(self.folder / f"{result.name.replace('/', '_')}.csv")
        result.note = "; ".join(filter(None, [counted, result.note]))
        self.results.append(result)
        print(
            f"[{time.monotonic() - self.began:4.0f} s] {result.name}: {result.outcome}"
            + (f" in {result.seconds:.0f} s" if result.seconds else "")
            + (f": {result.note}" if result.note else ""),
            flush=True,
        )
        with contextlib.suppress(OSError):
            proof_report.append_log(self.out, result)
        self.write()

    def _tick(self) -> None:
        if time.monotonic() - self.written > EVERY:
            self.write()


def _caches() -> None:
    """Where nothing can be written at home, compilers and verdicts keep theirs elsewhere, for all stages."""
    if not os.access(Path.home(), os.W_OK):
        elsewhere = Path(tempfile.gettempdir()) / "adamix-caches"
        for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "ADAMIX_CACHE"):
            os.environ.setdefault(name, str(elsewhere / name.lower()))


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
        epilog="In a copy of the tree without its history, $ADAMIX_COMMIT names the commit that the rows are of. Exit "
        "status: 0; 1 when a stage failed or ran out of time, which the report names; 3 without a GPU.",
    )
    parser.add_argument("--out", help="folder for report.md, results.csv, results.json, log.txt, verify.json and "
                        "tune.json (default: benchmarks/results/<GPU>; a temporary one for --smoke)")  # fmt: skip
    parser.add_argument("--part", type=int, choices=PARTS, help="1: verify, tests, sanitizers, predictions; 2: against "
                        "peers, whole steps, a profiler's counts (default: both, and tune)")  # fmt: skip
    parser.add_argument("--budget", type=float, help="seconds for everything (default: 900; of part 1 420, of part 2 "
                        "330; an hour for --smoke)")  # fmt: skip
    parser.add_argument("--smoke", action="store_true", help="every stage in a tiny size, also without a GPU")
    parser.add_argument("--skip", nargs="+", default=[], metavar="STAGE",
                        help="leave out stages: tests, check, build, steps, sanitizer, tune, merge, ...")  # fmt: skip
    parser.add_argument("--before", default="", metavar="FOLDER", help="holds an older adamix_kernels: its "
                        "weight gradients are looked at for a race, too")  # fmt: skip
    parser.add_argument("--join", nargs="+", metavar="FOLDER", help="run nothing: write into --out what the parts in "
                        "these folders found, a later one's in place of an earlier one's")  # fmt: skip
    return parser


if __name__ == "__main__":
    sys.exit(main())
