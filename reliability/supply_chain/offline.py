"""Imports every module of a package in a process of its own, in which no connection can be made."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

# Audit events cannot be got around from Python. A module named __main__ is a program, not imported by anyone.
_SCRIPT = """
import importlib, json, pkgutil, sys

asked = []
EVENTS = ("socket.connect", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo", "socket.gethostbyname",
          "socket.gethostbyaddr", "urllib.Request")

def refuse(event, arguments):
    if event in EVENTS:
        asked.append(f"{event}{arguments[-2:]!r}")
        raise OSError("there is no network")

sys.addaudithook(refuse)
package = importlib.import_module(sys.argv[1])
imported, unavailable = 1, []
for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.", onerror=unavailable.append):
    if module.name.endswith("__main__"):
        continue
    try:
        importlib.import_module(module.name)
        imported += 1
    except ImportError as error:
        unavailable.append(f"{module.name}: {error}")
    except OSError:
        pass
print("\\n" + json.dumps([imported, asked, unavailable]))
"""


def import_all(package: str, folder: Path | None = None) -> tuple[int, list[str], list[str]]:
    """(modules imported, tries to reach the network, modules that could not be imported and why).

    folder: where the package stands, if it is not on the path. RuntimeError when the process itself fails.
    """
    paths = [str(folder)] if folder else sys.path
    start = f"import sys; sys.path[:0] = {paths!r}"
    done = subprocess.run([sys.executable, "-c", start + _SCRIPT, package], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{package}: {done.stderr.strip().splitlines()[-1]}")
    imported, asked, unavailable = json.loads(done.stdout.splitlines()[-1])
    return imported, asked, unavailable
