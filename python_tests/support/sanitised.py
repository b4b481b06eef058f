"""Which sources of the kernels last ran under AddressSanitizer: `make sanitize` writes it down, `make test` asks.

    python python_tests/support/sanitised.py            exit status 0 where these very sources ran, 1 where not
    python python_tests/support/sanitised.py --begin    they are to run
    python python_tests/support/sanitised.py --write    they did; 1 where they have changed since they began

Of what ran: csrc/, who calls it, how it is compiled, the tests that are marked `sanitize` and what these import.
"""

import argparse
import datetime
import json
import re
import sys
from pathlib import Path

from adamix_kernels._build import HOST_FLAGS
from adamix_kernels._build.objects import fingerprint, replacing

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "benchmarks" / "results" / "sanitised.json"
BEGUN = ROOT / "build" / "csrc" / "sanitising"
IMPORT = re.compile(r"^(?:from|import) (\w+)", re.MULTILINE)


def tests() -> list[Path]:
    """The files that have such tests, that of the sanitisers themselves, and what of support/ they import."""
    cuda = sorted(ROOT.glob("python_tests/*/test_cuda_*.py"))
    found = [path for path in cuda if "mark.sanitize" in path.read_text()]
    found.append(ROOT / "python_tests" / "building" / "test_csrc_host.py")
    for path in found:
        for name in IMPORT.findall(path.read_text()):
            imported = Path(__file__).with_name(f"{name}.py")
            if imported.is_file() and imported not in found:
                found.append(imported)
    return found


def current() -> str:
    """The fingerprint of all that."""
    compiled = [path for end in ("h", "cpp", "cu") for path in ROOT.glob(f"csrc/**/*.{end}")]
    return fingerprint([*compiled, *ROOT.glob("adamix_kernels/ops/**/*cuda*.py"), *tests()], *HOST_FLAGS["asan"])


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    doing = parser.add_mutually_exclusive_group()
    doing.add_argument("--begin", action="store_true", help="they are to run")
    doing.add_argument("--write", action="store_true", help="they ran")
    options = parser.parse_args(arguments)
    now, place = current(), RECORD.relative_to(ROOT)
    if options.begin:
        BEGUN.parent.mkdir(parents=True, exist_ok=True)
        BEGUN.write_text(now)
        return 0
    if options.write:
        if BEGUN.read_text() != now:
            print(f"csrc/ or its tests changed while they ran: make sanitize again; {place} stays", file=sys.stderr)
            return 1
        with replacing(RECORD) as part:
            part.write_text(json.dumps({"sources": now, "date": str(datetime.date.today())}) + "\n")
        return 0
    try:
        record = json.loads(RECORD.read_text())
        known, when = record["sources"] == now, record["date"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        known, when = False, repr(error)
    if known:
        print(f"csrc/ is as it ran under AddressSanitizer on {when} ({place}): not run again")
        return 0
    print(f"csrc/ or its tests changed since they ran under AddressSanitizer ({place}: {when})")
    return 1


if __name__ == "__main__":
    sys.exit(main())
