"""Which sources of the kernels last ran under AddressSanitizer: `make sanitize` writes it down, `make test` asks.

    python python_tests/support/sanitised.py            exit status 0 where these very sources ran, 1 where not
    python python_tests/support/sanitised.py --write    they did, just now

What ran is csrc/ as it is compiled for the CPU, in the tests that are marked `sanitize`.
"""

import argparse
import datetime
import json
import sys
from pathlib import Path

from adamix_kernels._build.objects import fingerprint, replacing, source_folder, sources, with_includes

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "benchmarks" / "results" / "sanitised.json"


def tests() -> list[Path]:
    """The files that have such tests."""
    return [path for path in sorted(ROOT.glob("python_tests/*/test_cuda_*.py")) if "mark.sanitize" in path.read_text()]


def current() -> str:
    """The fingerprint of the sources and of these files."""
    csrc = source_folder()
    compiled = [path for source in sources(csrc, host=True) for path in with_includes(source, csrc, host=True)]
    return fingerprint([*compiled, *tests()])


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="they ran, just now")
    options = parser.parse_args(arguments)
    now = current()
    if options.write:
        with replacing(RECORD) as part:
            part.write_text(json.dumps({"sources": now, "date": str(datetime.date.today())}) + "\n")
        return 0
    try:
        record = json.loads(RECORD.read_text())
        known, when = record["sources"] == now, record["date"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        known, when = False, repr(error)
    if known:
        print(f"csrc/ is as it ran under AddressSanitizer on {when} ({RECORD.relative_to(ROOT)}): not run again")
        return 0
    print(f"csrc/ or its tests changed since they ran under AddressSanitizer ({RECORD.relative_to(ROOT)}: {when})")
    return 1


if __name__ == "__main__":
    sys.exit(main())
