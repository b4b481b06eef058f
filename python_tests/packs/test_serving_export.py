"""examples/serving/export_vllm.py: names of a pack as PEFT folders, and vLLM's command line."""

import json
import shlex
import sys
from pathlib import Path

import pytest
import tiny
import tiny_packs as tp
import torch

from adamix_kernels import pack, save_pack

peft = pytest.importorskip("peft")
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(EXAMPLES / "serving"), *sys.path])
    import export_vllm

    return export_vllm


def packed(build, folder, **configs):
    """(base folder, pack, its folder) of names with these configurations."""
    base = build()
    base.save_pretrained(folder / "base")
    kind = type(base)

    def again(**options):
        return kind.from_pretrained(folder / "base", **options)

    given = {n: tp.saved(folder / n, again, seed, **config) for seed, (n, config) in enumerate(configs.items())}
    model = pack(again().eval(), given)
    return folder / "base", model, save_pack(model, folder / "pack")


def test_peft_computes_what_the_pack_does_and_vllm_is_told_where(example, tmp_path, capsys):
    lora = {"method": "lora", "qkv": None}
    base, model, folder = packed(tiny.tiny_gpt2, tmp_path, a={**lora, "r": 3, "alpha": 5.0}, b={**lora, "r": 9})
    example.main(["--pack", str(folder), "--out", str(tmp_path / "out")])
    *said, line = capsys.readouterr().out.splitlines()
    assert said == [f"{tmp_path / 'out' / name}: rank {rank}" for name, rank in (("a", 3), ("b", 9))]
    words = shlex.split(line)
    assert words[:3] == ["vllm", "serve", str(base)]
    assert words[words.index("--max-lora-rank") + 1] == "16"
    assert words[words.index("--lora-modules") + 1 :] == [f"{name}={tmp_path / 'out' / name}" for name in "ab"]
    batch = tp.inputs(model)
    for word in words[-2:]:
        name, _, place = word.partition("=")
        served = peft.PeftModel.from_pretrained(type(model).from_pretrained(base), place).eval()
        with torch.no_grad():
            got = served(**batch).logits
        torch.testing.assert_close(got, tp.logits(model, [name] * 6, batch), **tp.CLOSE)
        keys = json.loads(Path(place, "adapter_config.json").read_text())
        assert keys["peft_type"] == "LORA"
        assert not keys["modules_to_save"]


def test_what_vllm_cannot_load_is_refused_by_name(example, tmp_path, capsys):
    _, _, folder = packed(tiny.tiny_bert, tmp_path, a={"bottleneck": 2})

    def refused(*words):
        with pytest.raises(SystemExit):
            example.main(["--pack", str(folder), "--out", str(tmp_path / "out"), *words])
        return capsys.readouterr().err

    assert "a: got a name with a head of its own, which vLLM cannot load, expected --no-head" in refused()
    assert "a: got adapters, which vLLM cannot load, expected a name trained as LoRA" in refused("--no-head")
    assert "names: got 'b', expected some of a" in refused("--names", "b")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="rank: got 513, expected at most 512"):
        example.command("base", tmp_path, {"a": 513})
