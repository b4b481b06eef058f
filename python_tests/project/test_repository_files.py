"""What outsiders meet first: the workflows call what exists, and no file tells another version than the package."""

import re
from pathlib import Path

import pytest

import adamix_kernels
from benchmarks import badges

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))


def jobs(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]


def commands(path):
    return [step["run"] for job in jobs(path).values() for step in job["steps"] if "run" in step]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_call_what_exists(path):
    for command in commands(path):
        for words in re.findall(r"^make (.+)$", command, flags=re.MULTILINE):
            assert {word for word in words.split() if "=" not in word} <= TARGETS, command
        for name in re.findall(r"python_tests/\S+|\.ci/run", command):
            assert (ROOT / name).is_file(), command


def test_every_python_that_is_claimed_is_tested():
    claimed = set(re.findall(r"Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text(encoding="utf-8")))
    assert claimed == set(jobs(ROOT / ".github/workflows/test.yml")["linux"]["strategy"]["matrix"]["python"])


def test_one_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == adamix_kernels.__version__
    assert citation["license"] == "Apache-2.0"
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)[1]
    assert newest in ("Unreleased", adamix_kernels.__version__)
    assert f"## To {adamix_kernels.__version__}\n" in (ROOT / "docs" / "upgrading.md").read_text(encoding="utf-8")
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    assert {hook["entry"].split()[0] for hook in repo["hooks"]} == {
        f".venv/bin/{tool}" for tool in ("ruff", "mypy", "clang-format")
    }


def test_badges_say_what_the_records_say(monkeypatch, capsys):
    assert badges.main([]) == 0
    assert "measured on GPU: none yet" in badges.svg([("measured on GPU", "none yet", badges.OPEN)])
    monkeypatch.setattr(badges, "PICTURE", ROOT / "docs" / "no_badges.svg")
    assert badges.main([]) == 1
    assert "--write" in capsys.readouterr().err


def test_an_offer_for_every_line_of_the_list():
    folder = ROOT / "docs" / "upstream"
    listed = set(re.findall(r"\]\((\w+\.md)\)", (folder / "README.md").read_text(encoding="utf-8")))
    assert listed == {path.name for path in folder.glob("*.md")} - {"README.md"}
