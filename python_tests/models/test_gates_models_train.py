"""Whole models with learned gates: train, save, load, generate, merge, refuse; padding, checkpointing, passes."""

import copy

import pytest
import tiny
import torch
import transformers

from adamix_kernels import (
    AdaMixConfig,
    AdaMixTrainer,
    adapt,
    disable,
    eval_routing,
    gate_losses,
    learn_merging,
    load_adamix,
    merge,
    save_adamix,
    summary,
    unmerge,
    use_experts,
    use_tasks,
)  # fmt: skip
from adamix_kernels.convert import export_adapterhub, export_peft
from adamix_kernels.models.gating import gates_of_layers, usage
from adamix_kernels.reports.observers import DrawCounter

TARGETS = {"target_modules": ["query", "value"]}
PRESETS = {
    "hydra_lora": lambda: AdaMixConfig.hydra_lora(r=2, **TARGETS),
    "lora_moe": lambda: AdaMixConfig.lora_moe(num_experts=3, r=2, **TARGETS),
    "mola": lambda: AdaMixConfig.mola(r=2, experts_pattern=[2, 4], z_weight=0.001, **TARGETS),
    "smear": lambda: AdaMixConfig.smear(num_experts=3, bottleneck=4),
    "threshold": lambda: AdaMixConfig(routing="learned", router="threshold", bottleneck=4, num_experts=3),
    "arrow": lambda: AdaMixConfig(
        "lora", 3, r=2, share=None, routing="learned", router="arrow", top_k=2, balance_weight=0.0, **TARGETS
    ),
    "task": lambda: AdaMixConfig(routing="learned", router="task", num_tasks=2, mix="weights", bottleneck=4),
}
ROW_TASKS = [0, 1, 1, 0]


def rows_of(model, tasks=False):
    batch = tiny.batch_for(model)
    batch["attention_mask"][1, 5:] = 0
    rows = [{name: value[n] for name, value in batch.items()} for n in range(4)]
    return [{**row, "task_ids": ROW_TASKS[n]} for n, row in enumerate(rows)] if tasks else rows


def arguments(folder, **options):
    values = dict(max_steps=3, learning_rate=0.02, per_device_train_batch_size=4, logging_steps=1, save_strategy="no")
    more = dict(report_to=[], disable_tqdm=True, use_cpu=True, seed=1, dataloader_pin_memory=False)
    return transformers.TrainingArguments(str(folder), **{**values, **more, **options})


def trained(folder, config, build=tiny.tiny_bert, **options):
    torch.manual_seed(0)
    model = adapt(build(), config)
    rows = rows_of(model, config.num_tasks is not None)
    trainer = AdaMixTrainer(model, arguments(folder, **options), train_dataset=rows)
    trainer.train()
    return model, trainer


def logits(model, tasks=None):
    batch = tiny.batch_for(model)
    batch.pop("labels")
    batch["attention_mask"][1, 5:] = 0
    model.eval()
    with torch.no_grad():
        if model.adamix.config.num_tasks is not None and not model.adamix.merged:
            with use_tasks(model, ROW_TASKS if tasks is None else tasks):
                return model(**batch).logits
        return model(**batch).logits


@pytest.mark.parametrize("name", PRESETS)
def test_train_save_load_and_merge(name, tmp_path, caplog):
    config = PRESETS[name]()
    assert AdaMixConfig.from_dict(config.to_dict()) == config
    assert config.consistency_weight == 0
    model, trainer = trained(tmp_path / "run", config)
    logs = [log for log in trainer.state.log_history if "cross_entropy" in log]
    for log in logs:
        parts = log["cross_entropy"]
        parts += config.balance_weight * log.get("balance_loss", 0) + config.z_weight * log.get("z_loss", 0)
        assert log["loss"] == pytest.approx(parts, abs=2e-4)
    assert ("balance_loss" in logs[0]) == (config.balance_weight > 0 and name != "task")
    assert ("z_loss" in logs[0]) == (name == "mola")
    assert logs[-1]["cross_entropy"] < logs[0]["cross_entropy"]
    before = dict(adapt_again(config).named_parameters())
    gate = [(n, p) for n, p in model.named_parameters() if ".gate." in n]
    assert bool(gate) == (name != "arrow")
    assert all((p - before[n]).abs().max() > 0 for n, p in gate)
    shares = usage(model)
    assert [sum(row) for row in shares] == pytest.approx([1] * len(shares), abs=1e-4)
    assert DrawCounter(model).shares() == shares
    text = summary(model)
    assert f"learned gates ({config.router}" in text
    want = logits(model)
    save_adamix(model, tmp_path / "saved")
    again = load_adamix(tiny.tiny_bert(), tmp_path / "saved")
    assert torch.equal(logits(again), want)
    assert usage(again) == shares
    by = "task" if name == "task" else "token or sample"
    with pytest.raises(ValueError, match=rf"gates differ by {by}, .*merge\(model, gates='mean'\)"):
        merge(model)
    with caplog.at_level("WARNING"):
        assert merge(model, gates="mean") is model
    assert "the mean gates stand for the learned ones; they do not say" in caplog.text
    assert all(0 <= value < 1 for value in model.adamix.gate_spread.values())
    merged = logits(model)
    assert (merged - want).abs().max() < 0.5 * (want - logits(tiny_base())).abs().max() + 0.05
    save_adamix(model, tmp_path / "merged")
    assert torch.equal(logits(load_adamix(tiny.tiny_bert(), tmp_path / "merged")), merged)
    with disable(model):
        off = logits(model)
    torch.testing.assert_close(logits(model), merged)
    unmerge(model)
    assert torch.equal(logits(model), want)
    with disable(model):
        assert torch.equal(logits(model), off)


def tiny_base():
    return adapt(tiny.tiny_bert(), AdaMixConfig(num_experts=1, consistency_weight=0.0))


def adapt_again(config):
    torch.manual_seed(0)
    return adapt(tiny.tiny_bert(), config)


def test_depth_and_patterns_say_what_each_layer_gets():
    config = AdaMixConfig.mola(
        r=2,
        experts_pattern=[2, 4],
        rank_pattern={"query": 3},
        alpha_pattern={r"1\.attention\.self\.value": 6},
        **TARGETS,
    )
    model = adapt(tiny.tiny_bert(), config)
    found = {path: model.get_submodule(path) for path in model.adamix.paths}
    assert [m.num_experts for m in found.values()] == [2, 2, 4, 4]
    assert [m.r for m in found.values()] == [3, 2, 3, 2]
    assert [m.alpha for m in found.values()] == [16, 16, 16, 6]
    assert "2-4 experts" in summary(model)
    with pytest.raises(ValueError, match=r"ids from 2 to 2, expected 0 <= id < 2"), use_experts(model, 2):
        pass
    by_path = adapt(tiny.tiny_bert(), AdaMixConfig.mola(r=2, experts_pattern={r"layer\.1\..*": 3}, **TARGETS))
    assert [by_path.get_submodule(p).num_experts for p in by_path.adamix.paths] == [8, 8, 3, 3]
    one = adapt(tiny.tiny_bert(), AdaMixConfig(bottleneck=4, rank_pattern={"1.output.dense": 2}))
    assert [one.get_submodule(p).adapter.bottleneck for p in one.adamix.paths] == [4, 2]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(top_k=2), "top_k: got 2 with routing='batch', expected it with routing='learned' alone"),
        (dict(routing="learned", num_experts=1), "num_experts: got 1, expected at least 2"),
        (dict(routing="learned", top_k=5), "top_k: got 5, expected None .* 1 <= top_k <= 4"),
        (dict(routing="learned", top_k=3, experts_pattern=[2, 4]), "top_k: got 3, expected None .* 1 <= top_k <= 2"),
        (dict(routing="learned", router="best"), "router: got 'best'"),
        (dict(routing="learned", router="arrow"), "router: got 'arrow' with method='adapter'"),
        (dict(routing="learned", router="task"), "num_tasks: got None for router='task'"),
        (dict(routing="learned", num_tasks=3), "num_tasks: got 3 for router='linear'"),
        (dict(routing="learned", router="threshold", top_k=2), "top_k: got 2 for router='threshold'"),
        (dict(routing="learned", mix="sum"), "mix: got 'sum'"),
        (dict(routing="learned", balance_weight=-1.0), "balance_weight: got -1.0"),
        (dict(routing="learned", experts_pattern=[]), r"experts_pattern: got \[\], expected a dict by path, or a list"),
        (dict(rank_pattern={"q": 0}), r"rank_pattern: got \{'q': 0\}"),
        (dict(rank_pattern={"(": 2}), r"rank_pattern: got '\(', expected a regular expression"),
        (dict(alpha_pattern={"q": 2}), "alpha_pattern: got .* with method='adapter'"),
    ],
)
def test_bad_configurations_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        AdaMixConfig(**options)


def test_what_gates_cannot_do_is_refused(tmp_path):
    model = adapt(tiny.tiny_bert(), PRESETS["mola"]())
    with pytest.raises(ValueError, match=r"saw no training batch"):
        merge(model, gates="mean")
    with pytest.raises(ValueError, match=r"gates: got 'max', expected 'mean' or None"):
        merge(model, gates="max")
    with pytest.raises(ValueError, match=r"for routing='batch', expected None"):
        merge(adapt(tiny.tiny_bert()), gates="mean")
    with pytest.raises(ValueError, match=r"gates weigh them already"):
        learn_merging(model)
    with pytest.raises(ValueError, match=r"learned gates, which PEFT's LoRA has no place for.*or expert=N"):
        export_peft(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    assert (export_peft(model, tmp_path / "one", expert=1) / "adapter_model.safetensors").exists()
    smear = adapt(tiny.tiny_bert(), PRESETS["smear"]())
    with pytest.raises(ValueError, match=r"learned gates, which AdapterHub's adapter has no place for"):
        export_adapterhub(smear, tmp_path / "b")
    with pytest.raises(ValueError, match=r"router: got 'sentence' for GPT2LMHeadModel .a model that generates"):
        adapt(tiny.tiny_gpt2(), PRESETS["smear"]())
    with pytest.raises(ValueError, match=r"router: got 'sentence' for T5.*in a decoder"):
        adapt(tiny.tiny_t5(), PRESETS["smear"]())
    from adamix_kernels import pack

    save_adamix(model, tmp_path / "gated")
    with pytest.raises(ValueError, match=r"gated: got experts with learned gates"):
        pack(tiny.tiny_bert(), {"a": tmp_path / "gated"})
    other = adapt(tiny.tiny_bert(), AdaMixConfig.mola(r=2, experts_pattern=[2, 4], top_k=1, **TARGETS))
    with pytest.raises(ValueError, match=r"got top_k = 1 in the model, expected 2"):
        load_adamix(other, tmp_path / "gated")


def test_a_merged_mixture_is_a_plain_lora_for_peft_and_packs(tmp_path):
    peft = pytest.importorskip("peft")
    from adamix_kernels import pack

    model, _ = trained(tmp_path / "run", PRESETS["lora_moe"]())
    merge(model, gates="mean")
    want = logits(model)
    export_peft(model, tmp_path / "peft")
    back = peft.PeftModel.from_pretrained(tiny.tiny_bert(), tmp_path / "peft").eval()
    batch = {k: v for k, v in tiny.batch_for(tiny.tiny_bert()).items() if k != "labels"}
    batch["attention_mask"][1, 5:] = 0
    with torch.no_grad():
        torch.testing.assert_close(back(**batch).logits, want, rtol=1e-4, atol=1e-5)
    assert back.peft_config["default"].r == 3 * 2
    save_adamix(model, tmp_path / "merged")
    served = pack(tiny.tiny_bert(), {"a": tmp_path / "merged"}).eval()
    with use_experts(served, "a"), torch.no_grad():
        torch.testing.assert_close(served(**batch).logits, want, rtol=1e-4, atol=1e-5)


def gradients(model, batch, checkpointing=None, autocast=False):
    model = copy.deepcopy(model).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing == "re"})
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(**batch)
    total = out.loss + gate_losses(model).total
    total.backward()
    return total.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", ["mola", "smear"])
def test_checkpointing_autocast_and_compile_train_the_same(name):
    config = PRESETS[name]()
    config.balance_weight = 0.5
    torch.manual_seed(0)
    model = adapt(tiny.tiny_bert(), config)
    for parameter in (p for n, p in model.named_parameters() if "lora_b" in n):
        torch.nn.init.normal_(parameter)
    batch = tiny.batch_for(model)
    loss, want = gradients(model, batch)
    assert all(g.abs().sum() > 0 for n, g in want.items() if ".gate." in n)
    again, got = gradients(model, batch, "non")
    assert torch.equal(loss, again)
    for n, g in want.items():
        torch.testing.assert_close(got[n], g, msg=n)
    with pytest.raises(RuntimeError, match=r"use_reentrant.: False"):
        gradients(model, batch, "re")
    half, rough = gradients(model, batch, autocast=True)
    torch.testing.assert_close(half, loss, rtol=0.05, atol=0.02)
    gates = [n for n in want if ".gate." in n]
    assert all(torch.isfinite(rough[n]).all() for n in gates)
    compiled = torch.compile(copy.deepcopy(model).train(), backend="aot_eager", fullgraph=True)
    out = compiled(**batch)
    total = out.loss + gate_losses(compiled._orig_mod).total
    total.backward()
    torch.testing.assert_close(total.detach(), loss)
    for n, p in compiled._orig_mod.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, want[n], rtol=1e-4, atol=1e-6, msg=n)


def test_padding_counts_nowhere():
    """A batch filled up with padding has the losses and the gates of the same texts without it."""
    config = AdaMixConfig.mola(r=2, num_experts=3, experts_pattern=None, z_weight=0.1, **TARGETS)
    torch.manual_seed(0)
    model = adapt(tiny.tiny_bert(), config).train()
    batch = {k: v for k, v in tiny.batch_for(model).items() if k != "labels"}
    model(**batch)
    short = gate_losses(model)
    wide = {n: torch.nn.functional.pad(v, (0, 6)) for n, v in batch.items()}
    model(**wide)
    padded = gate_losses(model)
    torch.testing.assert_close(padded, short)
    model(wide["input_ids"], wide["attention_mask"])
    torch.testing.assert_close(gate_losses(model), short)
    model(input_ids=wide["input_ids"])  # without a mask the padding counts
    assert (gate_losses(model).balance - short.balance).abs() > 1e-6
    assert gate_losses(model).total == 0  # taken


def test_two_passes_differ_by_dropout_alone(tmp_path):
    config = AdaMixConfig.mola(r=2, num_experts=3, experts_pattern=None, consistency_weight=1.0, **TARGETS)
    _, trainer = trained(tmp_path / "a", config)
    assert [log["consistency"] for log in trainer.state.log_history if "consistency" in log] == pytest.approx([0] * 3)
    _, trainer = trained(tmp_path / "b", config, lambda: tiny.tiny_bert(dropout=0.2))
    assert min(log["consistency"] for log in trainer.state.log_history if "consistency" in log) > 1e-6


def test_accumulated_steps_weigh_the_gates_once(tmp_path):
    config = AdaMixConfig.lora_moe(num_experts=3, r=2, balance_weight=0.5, **TARGETS)
    _, one = trained(tmp_path / "a", config, max_steps=1)
    _, two = trained(tmp_path / "b", config, max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    logs = [t.state.log_history[0] for t in (one, two)]
    assert logs[1]["loss"] == pytest.approx(logs[0]["loss"], rel=0.02)
    assert logs[1]["balance_loss"] == pytest.approx(logs[0]["balance_loss"], rel=0.02)


def test_the_trainer_chooses_checkpointing_that_keeps_gradients(tmp_path):
    config = PRESETS["mola"]()
    plain, _ = trained(tmp_path / "a", config, save_strategy="steps", save_steps=2)
    saving, _ = trained(tmp_path / "b", config, gradient_checkpointing=True)
    for (n, p), q in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=n)
    with pytest.raises(ValueError, match=r"got use_reentrant=True, expected False"):
        trained(
            tmp_path / "c", config, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}
        )
    torch.manual_seed(0)
    model = adapt(tiny.tiny_bert(), config)
    options = arguments(tmp_path / "a", save_strategy="steps", save_steps=2)
    AdaMixTrainer(model, options, train_dataset=rows_of(model)).train(str(tmp_path / "a" / "checkpoint-2"))
    for (n, p), q in zip(plain.named_parameters(), model.named_parameters(), strict=True):
        torch.testing.assert_close(p, q[1], msg=n)


@pytest.mark.parametrize("build", [tiny.tiny_gpt2, tiny.tiny_llama, tiny.tiny_t5])
def test_generate_is_one_forward_a_token(build):
    torch.manual_seed(0)
    model = adapt(build(), AdaMixConfig.lora_moe(num_experts=3, r=2, top_k=2)).eval()
    for name, parameter in model.named_parameters():
        if "lora_b" in name:
            torch.nn.init.normal_(parameter)
    batch = {k: v for k, v in tiny.batch_for(model).items() if k != "labels"}
    batch["attention_mask"][0, :3] = 0  # left padding
    options = dict(max_new_tokens=5, do_sample=False, min_new_tokens=5)
    cached = model.generate(**batch, **options)
    assert torch.equal(cached, model.generate(**batch, **options, use_cache=False))
    assert torch.equal(cached, model.train().generate(**batch, **options)) or build is tiny.tiny_t5
    assert model.generate(**batch, **options, num_beams=2).shape == cached.shape


def test_single_experts_and_random_ones_serve_for_comparison():
    model = adapt(tiny.tiny_bert(), PRESETS["lora_moe"]()).eval()
    for name, parameter in model.named_parameters():
        if "lora_b" in name:
            torch.nn.init.normal_(parameter)
    found = [logits(model)]
    for expert in range(3):
        with use_experts(model, expert):
            found.append(logits(model))
    with eval_routing(model, "token"):
        found.append(logits(model))
    assert min((a - b).abs().max() for n, a in enumerate(found) for b in found[:n]) > 1e-4


def test_rows_without_labels_are_predicted_by_their_tasks(tmp_path):
    model, trainer = trained(tmp_path, PRESETS["task"]())
    rows = [{name: value for name, value in row.items() if name != "labels"} for row in rows_of(model, True)]
    torch.testing.assert_close(torch.tensor(trainer.predict(rows).predictions), logits(model))


def test_tasks_are_asked_for_and_checked():
    model = adapt(tiny.tiny_bert(), PRESETS["task"]()).eval()
    with torch.no_grad():
        for gate in gates_of_layers(model).values():
            gate.logits.normal_()
    with pytest.raises(ValueError, match=r"tasks: got None"):
        model(**tiny.batch_for(model))
    assert not torch.equal(logits(model, [0, 0, 0, 0]), logits(model, [1, 1, 1, 1]))
    with pytest.raises(ValueError, match=r"tasks: got \[2\], expected ids \[B\] with 0 <= id < 2"):
        logits(model, [2])
    with pytest.raises(TypeError, match=r"tasks: got torch.float32"), use_tasks(model, [0.5]):
        pass
    with pytest.raises(ValueError, match=r"expected 'task_ids'|expected .task_ids."):
        AdaMixTrainer(model, arguments("x"), train_dataset=rows_of(model)).train()
