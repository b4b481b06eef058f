"""export_adapterhub, loaded by the real `adapters` in a process with the transformers it needs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

from adamix_kernels import AdaMixConfig, adapt, export_adapterhub, merge

ROOT = Path(__file__).parents[2]
# Folders, joined as in PYTHONPATH, that hold transformers 4.57 and `adapters`.
FOLDERS = os.environ.get("ADAMIX_ADAPTERS_PATH", str(ROOT / ".venv" / "transformers-4.57")).split(os.pathsep)
CASES = {
    "bert": ("bert", dict()),
    "roberta": ("roberta", dict(activation="gelu_tanh", share=None, bottleneck=7)),
    "some_layers": ("bert", dict(activation="relu", share="down", layers_to_transform=[1])),
    "linear": ("bert", dict(activation=None, bottleneck=3)),
    "merged": ("roberta", dict(activation="silu")),
    "widths": ("bert", dict(rank_pattern={"1.output.dense": 3})),
}
BUILD = {"bert": tiny.tiny_bert, "roberta": tiny.tiny_roberta}

pytestmark = pytest.mark.skipif(
    not any((Path(folder) / "adapters" / "__init__.py").is_file() for folder in FOLDERS),
    reason=f"`adapters` is in none of {FOLDERS}: `make test` puts it there, ADAMIX_ADAPTERS_PATH names another place",
)


def adapted(family, options):
    model = adapt(BUILD[family](), AdaMixConfig(**{**dict(bottleneck=5, num_experts=3), **options}))
    torch.manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or name.endswith("_score"):
                parameter.copy_(torch.randn_like(parameter) * 0.5)
    return model


@pytest.fixture(scope="module")
def logits(tmp_path_factory):
    """(ours, theirs): case -> logits of the merged experts; "case way" -> logits of the loaded folder."""
    folder = tmp_path_factory.mktemp("adapters")
    batch = {k: v for k, v in tiny.batch_for(BUILD["bert"]()).items() if k != "labels"}
    batch["attention_mask"][1, 5:] = 0
    torch.save(batch, folder / "batch.pt")
    ours = {}
    for name, (family, options) in CASES.items():
        BUILD[family]().save_pretrained(folder / name / "base")
        model = adapted(family, options)
        if name == "merged":
            merge(model)
        export_adapterhub(model, folder / name / "adapter", name="task")
        with torch.no_grad():
            ours[name] = model(**batch).logits
    kinds = {name: type(BUILD[family]()).__name__ for name, (family, _) in CASES.items()}
    (folder / "cases.json").write_text(json.dumps(kinds))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(FOLDERS), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "python_tests" / "support" / "load_with_adapters.py"), str(folder)],
        capture_output=True, text=True, env=environment, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    versions = json.loads(done.stdout.splitlines()[-1])
    assert versions["adapters"].startswith("1.3.")
    assert versions["transformers"].startswith("4.57.")
    return ours, torch.load(folder / "logits.pt", weights_only=True)


@pytest.mark.parametrize("name", CASES)
def test_adapters_computes_the_merged_model(name, logits):
    ours, theirs = logits
    for way in ("bin", "safetensors", "flexible"):
        torch.testing.assert_close(theirs[f"{name} {way}"], ours[name], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(theirs[f"{name} off"], ours[name], atol=1e-2)
