"""PackTrainer: each name of a mixed batch learns what it learns alone, to the last bit on the reference backend."""

import pytest
import tiny
import torch
from pack_jobs import ADAPTERS, LABELS, LORA, ROWS, TOKENS, same, stream, trainer_of, values
from torch.nn import functional as F

from adamix_kernels import AdaMixConfig, PackJob, Router, adapt, load_adamix, pack, use_experts
from adamix_kernels.models.objectives import Objective


@pytest.fixture
def by_sample(monkeypatch):
    """The base's products of [B, H], one row at a time: BLAS rounds two rows otherwise than sixteen."""
    linear = F.linear

    def each(x, weight, bias=None):
        frozen = not weight.requires_grad and x.dim() == 2
        return torch.cat([linear(row, weight, bias) for row in x.split(1)]) if frozen else linear(x, weight, bias)

    monkeypatch.setattr(F, "linear", each)


def rows_of(batch, names, wanted):
    mine = [n for n, name in enumerate(names) if name in wanted]
    return {key: value[mine] for key, value in batch.items()}, [names[n] for n in mine]


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("jobs", [ADAPTERS, LORA], ids=["adapter", "lora"])
def test_each_name_is_bit_for_bit_what_it_is_alone(jobs, dropout, by_sample):
    build = lambda: tiny.tiny_bert(dropout=dropout)  # noqa: E731
    together = trainer_of(jobs, build)
    begun = {name: values(together, name) for name in jobs}
    for batch, names in stream(together.model, 3):
        together.step(batch, names)
    room = max(bank.shape.rank for bank in together.banks.values())  # zeros beside a rank make another product
    for name, job in jobs.items():
        alone = trainer_of({name: job}, build, max_rank=room)
        for batch, names in stream(alone.model, 3):
            alone.step(*rows_of(batch, names, name))
        same(values(alone, name), values(together, name))
        moved = [not torch.equal(p, q) for p, q in zip(begun[name], values(together, name))]
        assert sum(moved) > len(moved) / 2


class Told(Router):
    """Gives the experts that it is told, first those of the down side, then those of the up side."""

    def draw(self, num_experts, *_):
        self.told = self.told[1:] + self.told[:1]
        return self.told[-1]


@pytest.mark.parametrize("method", ["adapter", "lora"])
def test_the_same_bits_as_adapt_and_torchs_adamw(method, by_sample):
    """What users have without a pack: adapt(), the loss, clip_grad_norm_, torch.optim.AdamW, a schedule of torch's."""
    config = AdaMixConfig(method=method, num_experts=2, share=None, routing="sample", bottleneck=8, r=4, alpha=8.0)
    job = PackJob(config, lr=1e-2, weight_decay=0.1, max_grad_norm=0.01, schedule="linear", total_steps=4, seed=7)
    together = trainer_of({"x": ADAPTERS["a"] if method == "adapter" else LORA["a"], "y": job})
    bare = tiny.tiny_bert()  # which sets a seed
    torch.manual_seed(7)
    model = adapt(bare, config, backend="reference").train()
    layers = [model.get_submodule(path) for path in model.adamix.paths]
    for layer in layers:
        (layer.adapter if method == "adapter" else layer).router = Told("sample")
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    plain = [p for n, p in named.items() if "bias" in n]
    optimizer = torch.optim.AdamW([p for n, p in named.items() if "bias" not in n], lr=1e-2, weight_decay=0.1)
    optimizer.add_param_group({"params": plain, "weight_decay": 0.0})
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 4)
    for batch, names in stream(model, 3, names="xyxyyxyx"):
        own = together.names["y"]
        drawn = own.experts(4, list(together.banks), together.experts) - own.slot * together.experts
        done = together.step(batch, names)["y"]
        mine, _ = rows_of(batch, names, "y")
        labels = mine.pop("labels")
        for layer, index in zip(layers, drawn):
            (layer.adapter if method == "adapter" else layer).router.told = list(index)
        loss, _ = Objective(model).loss(
            model, {k: torch.cat([v, v]) for k, v in mine.items()}, labels, doubled=True, weight=1.0
        )
        loss.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 0.01)
        assert done.lr == schedule.get_last_lr()[0]
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        same([done.loss, done.consistency, done.grad_norm], [loss.loss.detach(), loss.consistency, norm])
        assert norm > 0.01  # it was clipped
    with together.alone("y") as alone:
        got = {n: p for n, p in alone.named_parameters() if p.requires_grad}
        assert list(got) == list(named)
        same(list(got.values()), list(named.values()))


def test_no_bit_depends_on_what_the_other_names_do():
    """Other rows, another rate, values that are no numbers, in batches of the same shape."""
    kept = []
    for job, poison in ((ADAPTERS["b"], False), (PackJob(ADAPTERS["b"].config, lr=1e30, labels=LABELS, seed=9), True)):
        trainer = trainer_of({"a": ADAPTERS["a"], "b": job}, lambda: tiny.tiny_bert(dropout=0.1))
        for batch, names in stream(trainer.model, 3, names="abaabbab"):
            if poison:
                others = torch.tensor([name == "b" for name in names])
                batch["input_ids"][others] = batch["input_ids"][others].flip(1)
            trainer.step(batch, names)
        kept.append(values(trainer, "a"))
    assert not torch.isfinite(torch.cat([p.flatten() for p in trainer.names["b"].parameters()])).all()
    same(*kept)


def test_names_join_pause_finish_and_leave_while_others_go_on(tmp_path):
    jobs = {"a": ADAPTERS["a"], "c": ADAPTERS["c"]}
    trainer = trainer_of(jobs, capacity=3, max_rank=16, max_experts=3)
    alone = trainer_of({"a": ADAPTERS["a"]})
    batches = [(b, n) for b, n in stream(trainer.model, 5, names="aaaacccc")]
    addresses = [p.data_ptr() for p in trainer.model.parameters()]

    def go(step, other):
        batch, names = batches[step]
        trainer.step(batch, ["a" if name == "a" else other for name in names])
        alone.step(*rows_of(batch, names, "a"))

    go(0, "c")
    trainer.add("b", ADAPTERS["b"])
    go(1, "b")
    before = values(trainer, "b")
    trainer.pause("b")
    with pytest.raises(ValueError, match="names: got 'b', which is paused"):
        trainer.step(batches[2][0], ["b"] * 8)
    go(2, "c")
    same(values(trainer, "b"), before)
    trainer.resume("b")
    folder = trainer.finish("c", tmp_path / "c")
    assert list(trainer.names) == ["a", "b"]
    with pytest.raises(ValueError, match="names: got 'c', expected one of a, b"):
        trainer.step(batches[3][0], ["c"] * 8)
    go(3, "b")
    trainer.remove("b")
    trainer.add("d", ADAPTERS["b"])  # into a used slot
    for got, want in zip(trainer.names["d"].parameters(), trainer_of({"d": ADAPTERS["b"]}).names["d"].parameters()):
        assert torch.equal(got, want)
    go(4, "d")
    for got, want in zip(values(trainer, "a"), values(alone, "a")):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)
    assert trainer.names["a"].steps == 5
    assert [p.data_ptr() for p in trainer.model.parameters()] == addresses
    assert load_adamix(tiny.tiny_bert(), folder).adamix.merged


@pytest.mark.parametrize(("jobs", "build"), [(ADAPTERS, tiny.tiny_bert), (LORA, tiny.tiny_roberta)])
def test_what_is_finished_loads_alone_and_packs(jobs, build, tmp_path):
    """A merged checkpoint computes what the name's own model computed in evaluation, and goes into a pack."""
    trainer = trainer_of(jobs, build)
    batches = list(stream(trainer.model, 2))
    for batch, names in batches:
        trainer.step(batch, names)
    inputs = {k: v for k, v in batches[0][0].items() if k != "labels"}
    wants = {}
    for name in jobs:
        with trainer.alone(name) as model, torch.no_grad():
            model.eval()
            wants[name] = model(**inputs).logits
    states = {name: values(trainer, name) for name in jobs}
    for name in jobs:
        trainer.save(tmp_path / "state")  # looking changes nothing
        same(values(trainer, name), states[name])
        trainer.finish(name, tmp_path / name)
        labels = 3 if name == "b" else 2
        with torch.no_grad():
            got = load_adamix(build(num_labels=labels), tmp_path / name).eval()(**inputs).logits
        torch.testing.assert_close(got, wants[name], rtol=1e-5, atol=1e-6)
    bare, want = trainer.close(), build()
    assert {n: p.requires_grad for n, p in bare.named_parameters()} == {n: True for n, _ in want.named_parameters()}
    same(list(bare.state_dict().values()), list(want.state_dict().values()))
    assert bare.config.to_dict() == want.config.to_dict()
    served = pack(bare.eval(), {name: tmp_path / name for name in jobs})
    names = ["b", "a", "c", "a", "b", "c", "c", "a"]
    with torch.no_grad(), use_experts(served, names):
        logits = served(**inputs).logits
    for row, name in enumerate(names):
        torch.testing.assert_close(logits[row, : wants[name].shape[1]], wants[name][row], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("jobs", [ADAPTERS, LORA], ids=["adapter", "lora"])
def test_a_saved_training_goes_on_bit_for_bit(jobs, tmp_path):
    build = lambda: tiny.tiny_bert(dropout=0.1)  # noqa: E731
    through, first = trainer_of(jobs, build), trainer_of(jobs, build)
    for step, (batch, names) in enumerate(stream(through.model, 4)):
        through.step(batch, names)
        if step < 2:
            first.step(batch, names)
            first.save(tmp_path / "state")
    again = trainer_of(tmp_path / "state", build)
    assert [name.name for name in sorted((tmp_path / "state" / "a").iterdir())] == ["adamix_job.json", "step-2"]
    assert again.names["b"].job == jobs["b"]
    later = trainer_of({"a": jobs["a"]}, build, capacity=3, max_rank=16, max_experts=4)
    later.remove("a")
    for name in "cab":
        later.add(name, tmp_path / "state" / name)
    for batch, names in list(stream(again.model, 4))[2:]:
        again.step(batch, names)
    for name in jobs:
        same(values(again, name), values(through, name))
        same(values(later, name), values(first, name))
    torch.testing.assert_close(
        values(trainer_of({"x": tmp_path / "state" / "a"}, build), "x"), values(first, "a"), rtol=0, atol=0
    )


def test_accumulated_batches_are_one_batch():
    """Also where a name is in one of them alone, and where targets are ragged."""
    jobs = {
        "a": PackJob(AdaMixConfig(method="lora", num_experts=1, r=4), lr=1e-2),
        "b": PackJob(AdaMixConfig(method="lora", num_experts=1, r=2, consistency_weight=0.0), lr=1e-2),
    }
    build = lambda: tiny.tiny_gpt2(dropout=0.0)  # noqa: E731
    with pytest.raises(ValueError, match=r"b: .*h\.0\.attn.c_attn: got .* expected .* but for the rank"):
        trainer_of({**jobs, "b": PackJob(AdaMixConfig(method="lora", qkv=None))}, build)
    once, twice = trainer_of(jobs, build), trainer_of(jobs, build)
    batch = tiny.batch_for(once.model, ROWS, TOKENS)
    batch["labels"][:3, 5:] = -100
    names = list("aabaaaba")
    one = once.step(batch, names)
    for part in (slice(0, 3), slice(3, 5), slice(5, 8)):
        twice.accumulate({k: v[part] for k, v in batch.items()}, names[part])
    two = twice.update()
    for name in jobs:
        torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=1e-7)
        for p, q in zip(once.names[name].parameters(), twice.names[name].parameters()):
            torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)
    once.accumulate(batch, names)
    with pytest.raises(ValueError, match="save: got gradients that wait"):
        once.save("never")


@pytest.mark.parametrize("build", [tiny.tiny_gpt2, tiny.tiny_llama, tiny.tiny_t5])
def test_language_models_with_dropout_in_attention(build):
    """The names' own masks inside attention: no bit of one name depends on the others' seeds."""
    kept = []
    for seed in (1, 2):
        job = PackJob(AdaMixConfig(method="lora", num_experts=2, r=4), lr=1e-2)
        other = PackJob(AdaMixConfig(method="lora", num_experts=2, r=4, consistency_weight=0.0), seed=seed)
        trainer = trainer_of({"a": job, "b": other}, lambda: build(dropout=0.3))
        batch = tiny.batch_for(trainer.model, ROWS, TOKENS)
        assert trainer.step(batch, list("abababab"))["a"].loss.isfinite()
        kept.append([values(trainer, name) for name in "ab"])
    same(kept[0][0], kept[1][0])
    assert not all(torch.equal(p, q) for p, q in zip(kept[0][1], kept[1][1]))
    plain = trainer_of({"a": job, "b": other}, lambda: build(dropout=0.0))
    assert not torch.equal(plain.step(batch, list("abababab"))["a"].loss, kept[0][0][0])


def test_attention_by_the_formula_is_torchs():
    from adamix_kernels.packs.mix import Mix, OwnDropout

    query, key = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)
    attend = F.scaled_dot_product_attention
    mask = torch.randn(2, 1, 5, 5)
    for options in ({"is_causal": True}, {"attn_mask": mask}, {"attn_mask": mask > 0, "scale": 0.3}, {}):
        options["enable_gqa"] = True
        want = attend(query, key, key, **options)
        mode = OwnDropout(Mix(), False)
        mode._dropout = lambda x, p: x
        with mode:
            got = attend(query, key, key, dropout_p=0.5, **options)
        torch.testing.assert_close(got, want, equal_nan=True)


def test_train_gives_every_name_its_own_rows_and_steps():
    def collate(rows):
        return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}

    jobs = {
        "a": PackJob(AdaMixConfig(bottleneck=4), total_steps=5, seed=1),
        "b": PackJob(AdaMixConfig(bottleneck=4), total_steps=3, seed=2),
    }
    trainer = trainer_of(jobs, capacity=3)
    batch = tiny.batch_for(trainer.model, 10, TOKENS)
    rows = [{key: value[n] for key, value in batch.items()} for n in range(10)]
    seen, order = [], [trainer.names["a"].next_rows(10, 4)]

    def watch(done):
        seen.append(sorted(done))
        order.append(trainer.names["a"].next_rows(10, 4))
        if len(seen) == 2:
            trainer.add("c", PackJob(AdaMixConfig(bottleneck=4), total_steps=1))

    trainer.train({"a": rows, "b": rows[:3], "c": rows}, collate, batch_size=4, on_step=watch)
    assert seen == [["a", "b"], ["a", "b"], ["a", "b", "c"], ["a"], ["a"]]
    flat = [n for some in order for n in some][:20]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10))
    assert flat[:10] != flat[10:]
    with pytest.raises(ValueError, match="a: got a job without total_steps"):
        trainer_of({"a": ADAPTERS["a"]}).train({"a": rows}, collate)
    with pytest.raises(ValueError, match="rows: got none of 'a'"):
        trainer_of({"a": jobs["a"]}).train({"b": rows}, collate)
