"""Runs the compilers, several at a time: by ninja where it is installed, else in threads. Progress goes to stderr."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .objects import Compiled, replacing, stem
from .toolchain import BuildError, run

# The output is moved into place when it is whole; what the compiler said is kept, and shown when it failed.
_NINJA_RULE = "rule compile\n  command = $line\n  description = $what\n"
_NINJA_LINE = "{command} -o {part} > {log} 2>&1 && mv {part} {object} || {{ cat {log}; rm -f {part}; exit 1; }}"


def parallel(asked: int | None = None) -> int:
    """How many files are compiled at a time: `asked`, else $MAX_JOBS, else the processors this process may use."""
    if asked is not None:
        return asked
    text = os.environ.get("MAX_JOBS", "").strip()
    if text and not (text.isdecimal() and int(text) > 0):
        raise BuildError(f"MAX_JOBS: got {text!r}, expected a whole number above 0")
    return int(text) if text else processors()


def processors() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def find_ninja() -> str | None:
    """The program ninja, in $PATH or beside this Python's other programs (an isolated build sees those too)."""
    return shutil.which("ninja") or shutil.which("ninja", path=sysconfig.get_path("scripts"))


def compile_all(objects: Sequence[Compiled], jobs: int) -> list[Compiled]:
    """Makes the objects that are not there yet, `jobs` at a time; after a failure nothing more is started.

    Objects of the same sources with other contents go. Raises BuildError with what the compiler said.
    """
    waiting = [each for each in objects if not each.object.is_file()]
    if waiting:
        ninja = find_ninja()
        tell(f"compiling {len(waiting)} of {len(objects)} files, {jobs} at a time" + (", by ninja" if ninja else ""))
        if ninja:
            _by_ninja(ninja, waiting, jobs)
        else:
            _by_threads(waiting, jobs)
    for each in waiting:
        for old in each.object.parent.glob(f"{stem(each.source)}*"):
            if old.stem != each.object.stem:
                old.unlink()
    return list(objects)


def tell(words: str) -> None:
    print(f"adamix_kernels: {words}", file=sys.stderr, flush=True)


def ninja_file(waiting: Sequence[Compiled]) -> str:
    """build.ninja with one edge an object."""
    edges = []
    for each in waiting:
        names = {"object": each.object, "part": each.object.with_suffix(".o.part"), "log": each.log_file}
        quoted = {name: shlex.quote(str(path)) for name, path in names.items()}
        line = _NINJA_LINE.format(command=shlex.join(each.command), **quoted)
        what = f"{each.source.parent.name}/{each.source.name}"
        edges.append(
            f"build {_path(each.object)}: compile {_path(each.source)}\n  line = {_text(line)}\n  what = {what}\n"
        )
    return "\n".join([_NINJA_RULE, *edges])


def _by_ninja(ninja: str, waiting: Sequence[Compiled], jobs: int) -> None:
    folder = waiting[0].object.parent
    with replacing(folder / "build.ninja") as part:
        part.write_text(ninja_file(waiting))
    command = [ninja, "-C", str(folder), "-j", str(jobs)]
    environment = {**os.environ, "NINJA_STATUS": "[%f/%t] "}
    said = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, text=True, errors="replace"
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if line.startswith("["):
                    tell(line.rstrip())
                else:
                    said.append(line)
        except BaseException:
            process.terminate()
            raise
    if process.returncode:
        raise BuildError(f"status {process.returncode} from\n{shlex.join(command)}\n{''.join(said)}")


def _by_threads(waiting: Sequence[Compiled], jobs: int) -> None:
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(_compile, each) for each in waiting]
        try:
            for number, (each, future) in enumerate(zip(waiting, futures), 1):
                future.result()
                tell(f"[{number}/{len(waiting)}] {each.source.parent.name}/{each.source.name}")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _compile(each: Compiled) -> None:
    with replacing(each.object) as part:
        each.log_file.write_text(run(*each.command, "-o", part))


def _text(words: str) -> str:
    return words.replace("$", "$$")


def _path(path: Path) -> str:
    return _text(str(path)).replace(" ", "$ ").replace(":", "$:")
