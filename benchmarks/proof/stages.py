"""The stages of the GPU proof, in groups that run side by side; the most valuable groups first.

In two parts for machines that are rented by the minute: what is right, and as fast as predicted; how fast beside
others.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from adamix_kernels import _build

from .. import sizes
from ..ops.run import OPS
from . import ncu, tests, verify
from .run import Stage

PARTS = (1, 2)
# Seconds of the timed benchmarks on a GPU.
_OP_SECONDS = {"routed_adapter": 40, "routed_lora": 35, "consistency": 50, "merge": 20}
_MODEL_SECONDS = {"bert-base": 35, "roberta-large": 40, "gpt2-medium": 30}
_MIXTURE_SECONDS, _SMOKE_SECONDS = 40, 300
_BUILD, _VERIFY, _PREDICTED, _TESTS, _TOOLS, _NCU = 100, 110, 70, 100, 75, 60
# Shares of the GPU's memory while everything is checked at once; the rest is for kernels that are verified.
_SHARES = {"consistency": 0.3, "routed_adapter": 0.08, "routed_lora": 0.08, "merge": 0.05}
_PREDICTED_SHARE = 0.08
# Processes that compile what is only counted and predicted.
_PIECES = 4
# A model that a benchmark builds is not for verifying: what was, is known, and the rest is the reference's.
_AUTO = {"ADAMIX_AUTO": "table"}


def groups(
    folder: Path, out: Path, *, smoke: bool, skip: Sequence[str] = (), part: int | None = None, before: str = ""
) -> list[list[Stage]]:
    """The stages of a part, or all; one named in `skip` (or its part before a slash) is left out.

    folder: for the CSVs and logs of single stages. out: the folder of results. before: of another adamix_kernels, whose
    weight gradients race.
    """
    build = [_library(smoke)]
    right = [
        build,
        [_environment(smoke), _verify(out, smoke), *_warm(folder, smoke)],
        [_predicted(folder, smoke)],
        tests.stages(_SMOKE_SECONDS if smoke else _TESTS, smoke),
        [*_sanitizers(smoke), *_race(before, smoke)],
    ]
    fast = [
        [_op("routed_adapter", folder, smoke)],
        [_op("consistency", folder, smoke)],
        [_ncu(folder, smoke)],
        [_op("routed_lora", folder, smoke)],
        *([_models(names, folder, smoke)] for names in _model_names(smoke)),
        [_bench("mixtures", ["mixtures"], folder, _MIXTURE_SECONDS, smoke)],
        [_op("merge", folder, smoke)],
        [_bench("inference", ["inference"], folder, 20, smoke)],
    ]
    made = {None: [*right, *fast, [_tune(out, smoke)]], 1: right, 2: [build, *fast]}[part]
    wanted = [[s for s in group if s.name not in skip and s.name.partition("/")[0] not in skip] for group in made]
    return [group for group in wanted if group]


def _python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def _environment(smoke: bool) -> Stage:
    return Stage("environment", _python("-m", "adamix_kernels", "env", "--json"), _SMOKE_SECONDS if smoke else 60)


def _library(smoke: bool) -> Stage:
    """The C++/CUDA library, in place; what is up to date is not compiled again."""
    reason = "a smoke run builds nothing" if smoke else _build.obstacle() or ""
    return Stage("build", _python("-m", "benchmarks.proof.build"), _BUILD, whole=True, absent=reason)


def _verify(out: Path, smoke: bool) -> Stage:
    command = _python("-m", "benchmarks.proof.verify", f"--export={out / 'verify.json'}")
    okay = (0, verify.INCOMPLETE)
    absent = "a smoke run verifies nothing" if smoke else ""
    return Stage("verify", command, _VERIFY, paced=True, okay=okay, read=verify.read, absent=absent)


def _predicted(folder: Path, smoke: bool) -> Stage:
    if smoke:
        return Stage("predicted", absent="speeds are predicted of GPUs")
    return _bench("predicted", ["predicted"], folder, _PREDICTED, smoke)


def _race(before: str, smoke: bool) -> list[Stage]:
    if smoke:
        return [Stage("race", absent="a smoke run looks for no race")]
    command = _python("-m", "benchmarks.proof.race")
    made = [Stage("race", command, _TOOLS, skips=(2,), read=_read_race)]
    if before:
        # It is known to race, and passes by showing it.
        okay = (0, 1)
        made.append(
            Stage("race/before", [*command, f"--package={before}"], _TOOLS, okay=okay, skips=(2,), read=_read_before)
        )
    return made


def _read_race(status: int, output: str) -> tuple[bool, str]:
    found = [line for line in output.splitlines() if " calls differ, error " in line]
    shown = [line for line in found if not re.search(r": 0 of \d+ calls differ", line)]
    whole = bool(re.search(r"^\d+ backwards race or are wrong$", output, flags=re.MULTILINE))
    words = [f"{len(found)} calls repeated, {len(shown)} with other bits", *shown]
    if not whole:
        words.append("did not come to its end")
    return status == 0 and whole, "; ".join(words)[:600]


def _read_before(status: int, output: str) -> tuple[bool, str]:
    return status in (0, 1), _read_race(status, output)[1]


def _ncu(folder: Path, smoke: bool) -> Stage:
    absent = "a smoke run counts nothing" if smoke else "" if ncu.find() else "Nsight Compute was not found"
    command = _python("-m", "benchmarks.proof.ncu", f"--out={folder / 'ncu.csv'}")
    return Stage("ncu", command, _NCU, paced=True, environment=_AUTO, absent=absent, skips=(2,))


def _bench(
    name: str, arguments: list[str], folder: Path, seconds: float, smoke: bool, *, check: float = 0.0,
) -> Stage:  # fmt: skip
    """A benchmark's stage; check: instead of timing, check everything with that share of the GPU's memory."""
    command = _python("-m", "benchmarks.run", *arguments, f"--size={'smoke' if smoke else 'gpu'}")
    path = folder / f"{name.replace('/', '_')}.csv"
    if check:
        command += ["--check-only", f"--memory-share={check}"]
    seconds = _SMOKE_SECONDS if smoke else seconds
    # Compiling a model takes its time.
    item = 120.0 if check else 45.0
    return Stage(name, command, seconds, paced=True, csv=path, item_seconds=item, environment=_AUTO)


def _op(name: str, folder: Path, smoke: bool) -> Stage:
    return _bench(name, ["op", name, *([] if smoke else ["--brief"])], folder, _OP_SECONDS[name], smoke)


def _model_names(smoke: bool) -> list[list[str]]:
    """A process for each model; in a smoke run one for all, since importing transformers is most of it."""
    names = list(sizes.STEPS["smoke" if smoke else "gpu"])
    return [names] if smoke else [[name] for name in names]


def _models(names: list[str], folder: Path, smoke: bool) -> Stage:
    seconds = sum(_MODEL_SECONDS.get(name, 0) for name in names)
    # Compiling a whole model takes longer than all else of it.
    modes = [] if smoke else ["--modes", "eager", "graph"]
    return _bench(f"steps/{'+'.join(names)}", ["models", *names, *modes], folder, seconds, smoke)


def _warm(folder: Path, smoke: bool) -> list[Stage]:
    """Every check of ops, and their compilation: they fill the compilers' caches beside `verify`."""
    if smoke:
        return [Stage("check", absent="a smoke run checks where it times")]
    made = [_bench(f"check/{name}", ["op", name], folder, _VERIFY, smoke, check=_SHARES[name]) for name in OPS]
    for piece in range(_PIECES):
        words = ["predicted", f"--piece={piece}/{_PIECES}"]
        made.append(_bench(f"check/predicted{piece}", words, folder, _VERIFY, smoke, check=_PREDICTED_SHARE))
    # What the sanitizers run, first without them.
    command = _python("-m", "benchmarks.sanitize")
    made.append(Stage("check/sanitize", command, _VERIFY, paced=True, skips=(2,), environment=_AUTO))
    return made


def _sanitizers(smoke: bool) -> list[Stage]:
    program = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    made = []
    for tool in ("memcheck", "racecheck", "initcheck"):
        name = f"sanitizer/{tool}"
        if program is None or smoke:
            made.append(Stage(name, absent="compute-sanitizer was not found" if program is None else "a smoke run"))
            continue
        options = ["--tool", tool, "--error-exitcode", "9", "--print-limit", "20"]
        options += ["--target-processes", "application-only"]
        command = [program, *options, *_python("-m", "benchmarks.sanitize")]
        # Every tensor in an allocation of its own, so that its bounds are seen.
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", **_AUTO}
        how = dict(paced=True, spare=30.0, environment=environment, skips=(2,), read=read_sanitizer)
        made.append(Stage(name, command, _TOOLS, **how))
    return made


def read_sanitizer(status: int, output: str) -> tuple[bool, str]:
    """Errors that compute-sanitizer counted, and whether the program came to its end."""
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", output)
    calls = re.findall(r"^(\d+) calls$", output, flags=re.MULTILINE)
    first = re.search(r"^=+ +((?:Invalid|Error|Uninitialized|Warning|Race).*)$", output, flags=re.MULTILINE)
    words = [f"{calls[0]} calls" if calls else "did not come to its end", *(s for s in summary[-1:])]
    if first:
        words.append(f"first: {first.group(1)[:120]}")
    return status == 0 and bool(calls), "; ".join(words)


def _tune(out: Path, smoke: bool) -> Stage:
    path = out / "tune.json"
    command = _python("-m", "benchmarks.tune", f"--out={path}", "--repeats=10")
    return Stage("tune", command, _SMOKE_SECONDS if smoke else 30, paced=True, skips=(2,), read=_read_tune)


def _read_tune(status: int, output: str) -> tuple[bool, str]:
    done = len(re.findall(r"; shipped ", output))
    return status == 0, f"{done} classes of kernels"
