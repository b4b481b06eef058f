"""Bad input of what works on whole models: adapt and its contexts, merging, checkpoints, converters, the Trainer."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from torch import nn

import adamix_kernels as ak

from .kinds import Kind


def kinds() -> list[Kind]:
    folder = Path(tempfile.mkdtemp(prefix="adamix_bad_input_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)  # the kinds are tried later
    return [*_adapt(), *_contexts(), *_files(folder), *_official(folder), *_exports(folder), *_trainer(folder)]


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


def adapted(method: str = "adapter", targets=("0",), **options) -> nn.Module:
    options = dict(bottleneck=2, r=2) | options
    return ak.adapt(plain(), ak.AdaMixConfig(method=method, target_modules=list(targets), **options))


def tiny_bert(**options) -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=8, **options,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config).eval()


def _adapt() -> Iterator[Kind]:
    bare, done, bert = plain(), adapted(), tiny_bert()
    config = ak.AdaMixConfig

    def one(words, argument, model, *args, **options):
        return Kind(f"adapt: {words}", argument, lambda: ak.adapt(model, *args, **options), (model,))

    good = dict(target_modules=["0"])
    yield one("a model twice", "model", done, config(**good))
    yield Kind("adapt: no model", "model", lambda: ak.adapt(None))
    yield Kind("adapt: a path for a model", "model", lambda: ak.adapt("bert-base-uncased"))
    yield one("a dict for a config", "config", bare, {"method": "lora"})
    yield one("a word for a config", "config", bare, "lora")
    yield one("no targets for an unknown model", "target_modules", bare)
    yield one("no targets for LoRA on an unknown model", "target_modules", bare, config(method="lora"))
    yield one("a target that is no layer", "target_modules", bare, config(target_modules=["query"]))
    yield one("a target that is not linear", "target_modules", bare, config(target_modules=["1"]))
    yield one("a pattern that matches nothing", "target_modules", bare, config(target_modules="x.*"))
    yield one("all targets excluded", "target_modules", bare, config(**good, exclude_modules=["0"]))
    yield one("layers that are not there", "target_modules", bert, config(layers_to_transform=[9]))
    yield one("a module to save that is not there", "modules_to_save", bare, config(**good, modules_to_save=["head"]))
    yield one("backend 'gpu'", "backend", bare, config(**good), backend="gpu")
    yield one("backend None", "backend", bare, config(**good), backend=None)


def _contexts() -> Iterator[Kind]:
    bare, model = plain(), adapted()
    merged, lora = ak.merge(adapted()), ak.merge(adapted("lora"))

    def entered(manager):
        with manager:
            pass

    for name, call in (
        ("merge", ak.merge), ("unmerge", ak.unmerge), ("learn_merging", ak.learn_merging), ("summary", ak.summary),
        ("disable", lambda m: entered(ak.disable(m))), ("use_experts", lambda m: entered(ak.use_experts(m, 0))),
        ("eval_routing", lambda m: entered(ak.eval_routing(m, "token"))),
        ("save_adamix", lambda m: ak.save_adamix(m, "nowhere")),
        ("export_peft", lambda m: ak.export_peft(m, "nowhere")),
        ("export_adapterhub", lambda m: ak.export_adapterhub(m, "nowhere")),
    ):  # fmt: skip
        yield Kind(f"{name}: a model that is not adapted", "model", lambda call=call: call(bare), (bare,))
        yield Kind(f"{name}: no model", "model", lambda call=call: call(None))
    yield Kind("merge: a merged model", "model", lambda: ak.merge(merged), (merged,))
    yield Kind("merge: a merged LoRA model", "model", lambda: ak.merge(lora), (lora,))
    yield Kind("unmerge: an unmerged model", "model", lambda: ak.unmerge(model), (model,))
    yield Kind("learn_merging: a merged model", "model", lambda: ak.learn_merging(merged), (merged,))
    yield Kind("use_experts: a merged model", "model", lambda: entered(ak.use_experts(merged, 0)), (merged,))
    for level in ("expert", "", None, 0, ["token"]):
        yield Kind(
            f"eval_routing: level {level!r}", "level", lambda level=level: entered(ak.eval_routing(model, level)),
            (model,),
        )  # fmt: skip
    for words, index in (
        ("an id of no expert", 4), ("a negative id", -1), ("floating ids", [0.5, 1.0]), ("booleans", [True, False]),
        ("a word", "first"), ("None", None), ("three axes", [[[0]]]), ("ragged ids", [[0], [0, 1]]),
    ):  # fmt: skip
        yield Kind(
            f"use_experts: {words}", "index", lambda index=index: entered(ak.use_experts(model, index)), (model,)
        )

    def forward(index, rows=3):
        with ak.use_experts(model, index):
            model(torch.randn(rows, 8))

    yield Kind("use_experts: ids for another batch", "index", lambda: forward([0, 1]), (model,))
    yield Kind("use_experts: ids for no sample", "index", lambda: forward(torch.zeros(0, dtype=torch.int64)), (model,))
    yield Kind("use_experts: ids per token of other samples", "index", lambda: forward([[0, 1]]), (model,))


def _files(folder: Path) -> Iterator[Kind]:
    model = adapted()
    good = ak.save_adamix(model, folder / "good")
    header = (good / "adamix.json").read_text() if (good / "adamix.json").exists() else None
    names = sorted(path.name for path in good.iterdir())
    (folder / "a_file").write_text("x")
    yield Kind(
        "save_adamix: a file for a folder", "directory", lambda: ak.save_adamix(model, folder / "a_file"), (model,)
    )
    yield Kind("save_adamix: None for a folder", "directory", lambda: ak.save_adamix(model, None), (model,))
    yield Kind("load_adamix: None for a folder", "directory", lambda: ak.load_adamix(plain(), None))
    yield Kind("load_adamix: no model", "model", lambda: ak.load_adamix(None, good))
    yield Kind("load_adamix: backend 'gpu'", "backend", lambda: ak.load_adamix(plain(), good, backend="gpu"))
    missing, empty = folder / "missing", folder / "empty"
    empty.mkdir()
    for words, where in (("no such folder", missing), ("an empty folder", empty), ("a file", folder / "a_file")):
        yield Kind(f"load_adamix: {words}", str(where), lambda where=where: ak.load_adamix(plain(), where))
    for name in names:
        for words, content in (("empty", b""), ("nonsense", b"\0nonsense"), ("a JSON list", b"[]")):
            broken = folder / f"{name}.{words.replace(' ', '_')}"
            broken.mkdir()
            for other in names:
                (broken / other).write_bytes(content if other == name else (good / other).read_bytes())
            if name.endswith(".md"):
                continue
            model_here = plain()
            yield Kind(
                f"load_adamix: {name} is {words}", str(broken / name),
                lambda broken=broken, model_here=model_here: ak.load_adamix(model_here, broken), (model_here,),
            )  # fmt: skip
    assert header is None or json.loads(header)
    other = nn.Sequential(nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 3))
    yield Kind("load_adamix: another model", "0", lambda: ak.load_adamix(other, good), (other,))
    twice = adapted(bottleneck=3)
    yield Kind("load_adamix: an adapted model of another width", "0", lambda: ak.load_adamix(twice, good), (twice,))
    for words, content in (("not JSON", "{"), ("a list", "[]"), ("another version", '{"version": 9}'),
                           ("an unknown key", '{"experts": 3}'), ("a wrong type", '{"num_experts": "4"}')):  # fmt: skip
        path = folder / f"config {words}.json"
        path.write_text(content)
        argument = {"not JSON": str(path), "another version": "version", "a wrong type": "num_experts"}
        yield Kind(
            f"AdaMixConfig.load: {words}", argument.get(words, "config"), lambda path=path: ak.AdaMixConfig.load(path)
        )


def _official(folder: Path) -> Iterator[Kind]:
    bert = tiny_bert()

    def one(words, content, argument="path", model=bert):
        path = folder / f"official {words}.bin"
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            torch.save(content, path)
        return Kind(f"load_official: {words}", argument, lambda: ak.load_official(model, path), (model,))

    key = "bert.encoder.layer.0.output.ExpertSoup.MoA_A.deepspeed_experts.0.weight"
    yield one("no such file", None)
    yield one("nonsense", b"nonsense")
    yield one("empty", b"")
    yield one("a list", [1])
    yield one("no tensors", {"a": 1}, "a")
    yield one("more than tensors", {"a": Path})
    yield one("no experts", {"a": torch.zeros(1)})
    yield one("one side alone", {key: torch.zeros(2, 8)})
    yield Kind("load_official: None", "path", lambda: ak.load_official(bert, None), (bert,))


def _exports(folder: Path) -> Iterator[Kind]:
    adapter, lora = adapted(), adapted("lora")
    a_file = folder / "a_file"
    for expert in (4, -1, 1.5, "all", True):
        yield Kind(
            f"export_peft: expert {expert!r}", "expert",
            lambda expert=expert: ak.export_peft(lora, folder / "peft", expert=expert), (lora,),
        )  # fmt: skip
    yield Kind("export_peft: adapters", "model", lambda: ak.export_peft(adapter, folder / "peft"), (adapter,))
    yield Kind("export_peft: a file for a folder", "directory", lambda: ak.export_peft(lora, a_file), (lora,))
    yield Kind("export_adapterhub: LoRA", "model", lambda: ak.export_adapterhub(lora, folder / "hub"), (lora,))
    yield Kind("export_adapterhub: no BERT", "model", lambda: ak.export_adapterhub(adapter, folder / "hub"), (adapter,))
    bert = ak.adapt(tiny_bert(), ak.AdaMixConfig(bottleneck=2))
    for name in ("", "a b", "../a", "a.b", None, 3):
        yield Kind(
            f"export_adapterhub: name {name!r}", "name",
            lambda name=name: ak.export_adapterhub(bert, folder / "hub", name), (bert,),
        )  # fmt: skip
    yield Kind(
        "export_adapterhub: a file for a folder", "directory", lambda: ak.export_adapterhub(bert, a_file), (bert,)
    )


def _trainer(folder: Path) -> Iterator[Kind]:
    def args(**options):
        return transformers.TrainingArguments(
            str(folder / "trained"), report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", **options
        )

    bert = ak.adapt(tiny_bert(), ak.AdaMixConfig(bottleneck=2))
    merged = ak.merge(ak.adapt(tiny_bert(), ak.AdaMixConfig(bottleneck=2)))
    bare = tiny_bert()
    trainer = ak.AdaMixTrainer
    yield Kind("AdaMixTrainer: a model that is not adapted", "model", lambda: trainer(bare, args()))
    yield Kind("AdaMixTrainer: a merged model", "model", lambda: trainer(merged, args()))
    yield Kind(
        "AdaMixTrainer: a loss of one's own", "compute_loss_func",
        lambda: trainer(bert, args(), compute_loss_func=lambda *_: 0),
    )  # fmt: skip
    kwargs = {"use_reentrant": False, "preserve_rng_state": False}
    yield Kind(
        "AdaMixTrainer: checkpointing that draws anew", "args.gradient_checkpointing_kwargs",
        lambda: trainer(bert, args(gradient_checkpointing=True, gradient_checkpointing_kwargs=kwargs)),
    )  # fmt: skip
    good = trainer(bert, args(max_steps=1))
    yield Kind(
        "AdaMixTrainer: a batch without labels", "inputs",
        lambda: good.compute_loss(bert.train(), {"input_ids": torch.ones(2, 3, dtype=torch.int64)}),
    )  # fmt: skip

    def passes():
        good.model.adamix.router.passes = 3
        good.training_step(bert.train(), {"input_ids": torch.ones(2, 3, dtype=torch.int64), "labels": torch.zeros(2)})

    yield Kind("AdaMixTrainer: three passes", "router.passes", passes)
