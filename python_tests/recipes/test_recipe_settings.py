"""docs/recipe_settings.md: each `value, file.json:line` of our side is what stands on that line."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "recipe_settings.md"
CONFIGS = ROOT / "adamix_kernels" / "recipes" / "configs"
CLAIM = re.compile(r"([\w.-]+), ((?:[\w-]+\.json:\d+(?:, )?)+)")


def claims():
    rows = [line.split("|") for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    for _, name, _, ours, *_ in rows:
        for value, places in CLAIM.findall(ours):
            for file, line in re.findall(r"([\w-]+\.json):(\d+)", places):
                yield name.strip(), value, file, int(line)


def test_every_setting_is_the_one_on_its_line():
    found = list(claims())
    assert len(found) > 60
    for name, value, file, number in found:
        line = (CONFIGS / file).read_text(encoding="utf-8").splitlines()[number - 1]
        stands = json.loads("{" + line.strip().rstrip(",") + "}")
        assert [str(each) for each in stands.values()] == [value], f"{name}: {file}:{number} is {line.strip()}"


def test_no_setting_of_the_recipes_is_missing():
    """Every number and word of `training`, `adamix` and `generation` that all of a family's tasks share has a row."""
    told = {(file, number) for _, _, file, number in claims()}
    ours = ("per_device_eval_batch_size", "lr_scheduler_type", "method", "routing")  # no result depends on the first
    for file in sorted({file for file, _ in told}):
        lines = (CONFIGS / file).read_text(encoding="utf-8").splitlines()
        start, end = lines.index('    "training": {'), lines.index('    "methods": {')
        for number, line in enumerate(lines[start:end], start + 1):
            key = re.match(r' +"(\w+)": [^\[{]', line)
            if key and key[1] not in ours:
                known = (file, number) in told or (file.replace("adapter", "lora"), key[1]) in {
                    (f, (CONFIGS / f).read_text(encoding="utf-8").splitlines()[n - 1].split('"')[1]) for f, n in told
                }
                assert known, f"docs/recipe_settings.md says nothing of {file}:{number} {line.strip()}"
