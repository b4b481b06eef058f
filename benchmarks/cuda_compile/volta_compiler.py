"""nvcc, but with NVRTC's PTX for compute_70 in the place of its own.

python benchmarks/cuda_compile/volta_compiler.py --nvcc NVCC --wheels FOLDER OPTIONS SOURCE -o OBJECT

nvcc 13 says by --dryrun what it would do for compute_75; that is done, with the other PTX in its hands.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

_STAND_IN = ("-gencode", "arch=compute_75,code=compute_75")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0; 1 with the messages on stderr where nothing was compiled."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nvcc", required=True)
    parser.add_argument("--wheels", required=True)
    options, rest = parser.parse_known_args(arguments)
    source = rest[rest.index("-o") - 1]
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"TMPDIR": folder}
        ptx = str(Path(folder) / "compute_70.ptx")
        includes = [word for word in rest if word.startswith("-I")]
        nvrtc = [sys.executable, str(Path(__file__).with_name("nvrtc.py")), "--wheels", options.wheels, "--ptx"]
        plan = [options.nvcc, "--dryrun", *_STAND_IN, *rest]
        for command in ([*nvrtc, *includes, source, "-o", ptx], plan):
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode:
                print(done.stderr, file=sys.stderr)
                return 1
        for command in _commands(done.stderr, environment, ptx):
            done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True)
            if done.returncode:
                print(f"{command}\n{done.stdout}{done.stderr}", file=sys.stderr)
                return 1
    return 0


def _commands(plan: str, environment: dict[str, str], ptx: str) -> list[str]:
    """nvcc's steps, as shell commands; the variables they need are put into `environment`."""
    found = []
    for line in re.findall(r"^#\$ (.*)$", plan, re.MULTILINE):
        assigned = re.match(r"(\w+)=(.*)", line)
        if assigned:
            environment[assigned[1]] = assigned[2].strip()
        elif line.startswith("fatbinary "):
            found.append(line.replace("kind=ptx,sm=75", "kind=ptx,sm=70"))
            found[-1] = re.sub(r"(?<=,file=)[^\"]*", ptx, found[-1])
        elif not line.startswith("rm "):
            found.append(line)
    return found


if __name__ == "__main__":
    sys.exit(main())
