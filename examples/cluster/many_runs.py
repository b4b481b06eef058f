"""Many runs (names of a pack, recipes, seeds), one `adamix` command a line, on whatever machines there are.

runs.txt, where # begins a comment:

    adamix train --data books.csv --out runs/books
    adamix train --data songs.csv --out runs/songs --method lora
    adamix recipe run glue/bert-base/sst2 --methods adamix --results runs/sst2.jsonl

One after the other on this machine; as an array of any scheduler, whose elements share the lines; as Ray jobs, one a
line (the extra "ray"):

    python examples/cluster/many_runs.py runs.txt
    python examples/cluster/many_runs.py runs.txt --array-index 3 --array-size 16
    python examples/cluster/many_runs.py runs.txt --ray http://127.0.0.1:8265

Slurm (`sbatch --array=0-15 --wrap "python examples/cluster/many_runs.py runs.txt"`) and AWS Batch tell index and size
by themselves; elsewhere give them, as in `--array-index $PBS_ARRAY_INDEX --array-size 16`, counted from 0. All of them
run in the present folder, which the machines share.

A command that ended well is not run again: `runs.txt.state/<digest>.done` says so, and `<digest>.log` beside it holds
what it printed; a changed command is another one. The exit status is 1 where one failed; the others are run all the
same. An `adamix train` that was stopped goes on from its last checkpoint.
"""

import argparse
import hashlib
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

# index and size, and the lowest index, the highest and the step, as the schedulers tell them
SCHEDULERS = (
    ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", *(f"SLURM_ARRAY_TASK_{name}" for name in ("MIN", "MAX", "STEP"))),
    ("AWS_BATCH_JOB_ARRAY_INDEX", "AWS_BATCH_JOB_ARRAY_SIZE", "", "", ""),
)
PROGRAMS = {"adamix": [sys.executable, "-m", "adamix_kernels"], "python": [sys.executable]}


class Line(NamedTuple):
    """number: in the file, from 1. words: of the command. state: what its files' names begin with."""

    number: int
    words: list[str]
    state: Path

    @property
    def done(self):
        return self.state.with_name(f"{self.state.name}.done")


def read(path):
    """The lines of a file. Raises ValueError for one that is no command, or that is there twice."""
    found, seen = [], {}
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            words = shlex.split(text, comments=True)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: got {text!r} ({error}), expected one command") from None
        if not words:
            continue
        if words[0] not in PROGRAMS:
            raise ValueError(f"{path}:{number}: got {words[0]!r}, expected a command of {' or '.join(PROGRAMS)}")
        key = hashlib.sha256("\0".join(words).encode()).hexdigest()[:12]
        if key in seen:
            raise ValueError(f"{path}:{number}: got the command of line {seen[key]} again, expected each once")
        seen[key] = number
        found.append(Line(number, words, Path(f"{path}.state", key)))
    if not found:
        raise ValueError(f"{path}: got no command, expected one a line")
    return found


def share(lines, index, size, environment=os.environ):
    """The lines of one element of an array: every size-th. Raises ValueError where index and size are no such thing."""
    if index is None and size is None:
        for at, count, least, most, by in SCHEDULERS:
            if at in environment and count in environment:
                first, size, step = int(environment.get(least, 0)), int(environment[count]), int(environment.get(by, 1))
                index, rest = divmod(int(environment[at]) - first, step)
                last = int(environment.get(most, first + (size - 1) * step))
                if rest or (last - first) // step + 1 != size:
                    raise ValueError(
                        f"array: got {size} indices from {first} to {last} by {step}, expected all between them, "
                        "as of --array=0-15 or --array=0-30:2, or --array-index and --array-size"
                    )
                break
        else:
            return lines
    if index is None or size is None or not 0 <= index < size:
        raise ValueError(f"array: got index {index} of size {size}, expected both, the index from 0 and below the size")
    return lines[index::size]


def resumed(line, log):
    """["--resume"] where an earlier try of this `adamix train` left a checkpoint in --out, else []."""
    if line.words[:2] != ["adamix", "train"] or not log.exists():
        return []
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--out", "--output_dir", "--output-dir", default="adamix_out")
    parser.add_argument("--resume", nargs="?", const=True)
    known, _ = parser.parse_known_args(line.words[2:])
    begun = any(Path(known.out).glob("checkpoint-*"))
    return ["--resume"] if begun and known.resume is None else []


def run(line):
    """Whether it ended well, now or before."""
    if line.done.exists():
        print(f"line {line.number}: done before", flush=True)
        return True
    line.state.parent.mkdir(parents=True, exist_ok=True)
    began = time.time()
    log = line.state.with_name(f"{line.state.name}.log")
    words = [*PROGRAMS[line.words[0]], *line.words[1:], *resumed(line, log)]
    with log.open("wb") as out:
        status = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT).returncode
    if status == 0:
        line.done.write_text(f"{shlex.join(line.words)}\n{time.time() - began:.1f} s\n", encoding="utf-8")
    said = "done" if status == 0 else f"exit status {status}"
    print(f"line {line.number}: {said} in {time.time() - began:.1f} s, {log}", flush=True)
    return status == 0


def run_as_jobs(path, lines, address, gpus):
    """One Ray job a line, each this program as an array's element; waits for all, and tells how each ended."""
    try:
        from ray.job_submission import JobStatus, JobSubmissionClient
    except ModuleNotFoundError as missing:
        sys.exit(f"{missing.name}: not installed, expected the extra: pip install 'adamix_kernels[ray]'")
    client = JobSubmissionClient(address)
    before = {job.submission_id: job.status for job in client.list_jobs() if job.submission_id}
    waiting = {}
    for k, line in enumerate(lines):
        name = f"adamix-{line.state.name}"
        if line.done.exists():
            print(f"line {line.number}: done before", flush=True)
            continue
        if name in before and before[name].is_terminal():
            client.delete_job(name)
        if name not in before or before[name].is_terminal():
            words = [sys.executable, str(Path(__file__).resolve()), str(path.resolve())]
            words += ["--array-index", str(k), "--array-size", str(len(lines))]
            command = f"cd {shlex.quote(os.getcwd())} && {shlex.join(words)}"
            variables = {key: os.environ[key] for key in ("PYTHONPATH", "OMP_NUM_THREADS") if key in os.environ}
            client.submit_job(
                entrypoint=command, submission_id=name, entrypoint_num_cpus=1, entrypoint_num_gpus=gpus,
                runtime_env={"env_vars": variables},
            )  # fmt: skip
        waiting[name] = line
        print(f"line {line.number}: job {name}", flush=True)
    wrong = 0
    while waiting:
        for name, line in list(waiting.items()):
            status = client.get_job_status(name)
            if status.is_terminal():
                del waiting[name]
                wrong += status != JobStatus.SUCCEEDED
                print(f"line {line.number}: {str(status).lower()}, {line.state}.log", flush=True)
        time.sleep(1 if waiting else 0)
    return wrong


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, help="file with a command a line")
    parser.add_argument("--array-index", type=int, help="of this element, from 0")
    parser.add_argument("--array-size", type=int, help="elements that share the lines")
    parser.add_argument("--ray", metavar="ADDRESS", help="of the dashboard of a Ray cluster: a job for each line")
    parser.add_argument("--gpus", type=float, default=0, help="of a Ray job")
    options = parser.parse_args(arguments)
    try:
        lines = read(options.runs)
        if options.ray:
            return 1 if run_as_jobs(options.runs, lines, options.ray, options.gpus) else 0
        mine = share(lines, options.array_index, options.array_size)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"{len(mine)} of {len(lines)} lines", flush=True)
    wrong = [line.number for line in mine if not run(line)]
    if wrong:
        print(f"failed: line {', '.join(map(str, wrong))}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
