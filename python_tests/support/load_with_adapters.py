"""Run where transformers 4.57 and `adapters` are: loads exported folders, and saves the logits they give.

argv: a folder with `cases.json` (name -> model class), `batch.pt`, and per case `<name>/base` and `<name>/adapter`.
"""

import json
import sys
from pathlib import Path

import adapters
import torch
import transformers


def main(folder):
    torch.set_num_threads(1)
    batch = torch.load(folder / "batch.pt", weights_only=True)
    found = {}
    for name, kind in json.loads((folder / "cases.json").read_text()).items():
        base, exported = str(folder / name / "base"), str(folder / name / "adapter")
        for weights, safe in (("bin", False), ("safetensors", True)):
            model = getattr(transformers, kind).from_pretrained(base)
            adapters.init(model)
            model.set_active_adapters(model.load_adapter(exported, use_safetensors=safe))
            found[f"{name} {weights}"] = logits(model, batch)
        model.set_active_adapters(None)
        found[f"{name} off"] = logits(model, batch)
        flexible = adapters.AutoAdapterModel.from_pretrained(base)
        flexible.load_adapter(exported, set_active=True)
        found[f"{name} flexible"] = logits(flexible, batch)
    torch.save(found, folder / "logits.pt")
    print(json.dumps({"adapters": adapters.__version__, "transformers": transformers.__version__}))


def logits(model, batch):
    with torch.no_grad():
        return model.eval()(**batch).logits


if __name__ == "__main__":
    main(Path(sys.argv[1]))
