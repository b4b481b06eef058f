"""Which commit of this package made a row."""

from __future__ import annotations

import functools
import subprocess
from pathlib import Path

from .._extras import _recorded

_PACKAGE = Path(__file__).resolve().parents[1]


@functools.cache
def commit() -> str | None:
    """The commit of the checkout this package is run from, "-dirty" behind it where the package's files differ from
    it; the commit it was installed from with pip and git; None where neither is known."""
    if (_PACKAGE.parent / ".git").exists():
        found = _git("rev-parse", "--short=12", "HEAD")
        if found:
            return found + ("-dirty" if _git("status", "--porcelain", "--", _PACKAGE.name) else "")
    version: str | None = _recorded().get("vcs_info", {}).get("commit_id")
    return version and version[:12]


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(_PACKAGE.parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
