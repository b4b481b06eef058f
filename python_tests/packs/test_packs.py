"""pack: several adaptations in one model, each sample through the name it is given."""

import json
import shutil

import pytest
import tiny
import tiny_packs as tp
import torch

from adamix_kernels import (
    AdaMixConfig,
    adapt,
    add_expert,
    export_peft,
    load_adamix,
    load_pack,
    merge,
    pack,
    remove_expert,
    replace_expert,
    save_adamix,
    save_pack,
    summary,
    unpack,
    use_experts,
)

TWO, THREE = ["no", "yes"], ["cat", "dog", "owl"]
BUILDS = {"bert": tiny.tiny_bert, "roberta": tiny.tiny_roberta, "gpt2": tiny.tiny_gpt2_classifier}


def folders(root, kind):
    """Two label sets, ranks, scalings, methods, merged and not."""
    build = BUILDS[kind]
    return build, {
        "leases": tp.saved(root / "a", build, 1, labels=TWO, bottleneck=4, activation="gelu"),
        "patents": tp.saved(root / "b", build, 2, labels=THREE, bottleneck=9, share=None, activation="gelu"),
        "mails": tp.saved(root / "c", build, 3, labels=THREE, method="lora", r=3, alpha=6.0, merged=False),
        "notes": tp.saved(root / "d", build, 4, labels=TWO, method="lora", r=5, alpha=8.0, use_rslora=True),
    }


@pytest.mark.parametrize("kind", BUILDS)
def test_each_sample_of_a_mixed_batch_is_as_its_adaptation_alone(kind, tmp_path):
    build, given = folders(tmp_path, kind)
    model = pack(build(), given)
    batch = tp.inputs(model)
    names = ["patents", "leases", "mails", "notes", "leases", "mails"]
    mixed = tp.logits(model, names, batch)
    assert mixed.shape == (6, 3)
    for name, folder in given.items():
        labels = model.adamix.pack.entries[name].labels
        assert labels == (TWO if name in ("leases", "notes") else THREE)
        rows = [n for n, chosen in enumerate(names) if chosen == name]
        want = tp.alone(build, folder, batch, len(labels))[rows]
        torch.testing.assert_close(mixed[rows, : len(labels)], want, **tp.CLOSE)
        assert (mixed[rows, len(labels) :] == -torch.inf).all()
        torch.testing.assert_close(tp.logits(model, name, batch)[rows], mixed[rows], **tp.CLOSE)
    others = tp.logits(model, names[1:] + names[:1], batch)
    assert (others.softmax(-1) - mixed.softmax(-1)).abs().amax(1).min() > 1e-3
    assert not any(p.requires_grad for p in model.parameters())


def test_memory_is_one_base_and_the_slots(tmp_path):
    build, given = folders(tmp_path, "bert")
    base = sum(p.numel() for p in build().parameters())
    model = pack(build(), given)
    hidden = tiny.HIDDEN
    adapters = 2 * 4 * (9 * hidden * 2 + 9 + hidden + 2)  # 2 layers, 4 slots of rank 9, with the merge scores
    loras = 4 * 4 * (5 * hidden * 2 + 2)  # query and value of 2 layers
    heads = 4 * (3 * hidden + 3)
    assert sum(p.numel() for p in model.parameters()) == base - 2 * hidden - 2 + adapters + loras + heads
    assert "adapter, 4 experts" in summary(model)


def test_peft_folders_with_their_patterns_and_heads(tmp_path):
    pytest.importorskip("peft")
    common = {"task_type": "SEQ_CLS", "target_modules": ["query", "value"]}
    one = tp.peft_saved(tmp_path / "a", tiny.tiny_bert(2), 1, r=4, lora_alpha=8, **common)
    two = tp.peft_saved(
        tmp_path / "b", tiny.tiny_bert(3), 2, r=2, lora_alpha=3, use_rslora=True,
        rank_pattern={"layer.1.attention.self.query": 6}, alpha_pattern={"0.attention.self.value": 5},
        task_type="SEQ_CLS", target_modules=["query", "value", "intermediate.dense"],
    )  # fmt: skip
    adamix = tp.saved(tmp_path / "c", tiny.tiny_bert, 3, labels=TWO, method="lora", r=3, alpha=6.0)
    model = pack(tiny.tiny_bert(), {"a": tmp_path / "a", "b": tmp_path / "b", "c": adamix})
    batch = tp.inputs(model)
    mixed = tp.logits(model, ["a", "b", "c", "b", "a", "c"], batch)
    with torch.no_grad():
        torch.testing.assert_close(mixed[[0, 4], :2], one(**batch).logits[[0, 4]], **tp.CLOSE)
        torch.testing.assert_close(mixed[[1, 3]], two(**batch).logits[[1, 3]], **tp.CLOSE)
    torch.testing.assert_close(mixed[[2, 5], :2], tp.alone(tiny.tiny_bert, adamix, batch)[[2, 5]], **tp.CLOSE)


def test_fused_layers_keep_their_slices_and_meet_whole_ones(tmp_path):
    pytest.importorskip("peft")
    lora = {"method": "lora", "alpha": 6.0}
    sliced = tp.saved(tmp_path / "a", tiny.tiny_gpt2, 1, r=2, **lora)
    other = tp.saved(tmp_path / "b", tiny.tiny_gpt2, 2, r=3, **lora)
    model = pack(tiny.tiny_gpt2(), {"a": sliced, "b": other})
    layer = model.get_submodule(model.adamix.paths[0])
    assert layer.output_offsets == (0, 64)
    assert layer.lora_b.shape == (2, 64, 3)
    peft = tp.peft_saved(tmp_path / "c", tiny.tiny_gpt2(), 3, r=4, target_modules=["c_attn"], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match=r"a: .*c_attn: got a LoRA of all 96 columns, expected one of slices of 32"):
        replace_expert(model, "a", tmp_path / "c")
    both = pack(tiny.tiny_gpt2(), {"a": sliced, "b": other, "c": tmp_path / "c"})
    batch = tp.inputs(both)
    mixed = tp.logits(both, ["a", "b", "c", "c", "b", "a"], batch)
    for name, rows in {"a": [0, 5], "b": [1, 4]}.items():
        want = tp.alone(tiny.tiny_gpt2, {"a": sliced, "b": other}[name], batch)
        torch.testing.assert_close(mixed[rows], want[rows], **tp.CLOSE)
    with torch.no_grad():
        torch.testing.assert_close(mixed[[2, 3]], peft(**batch).logits[[2, 3]], **tp.CLOSE)
    for name in ("a", "c"):  # both kinds, unpacked, are checkpoints of their own
        folder = unpack(both, name, tmp_path / f"out_{name}")
        torch.testing.assert_close(tp.alone(tiny.tiny_gpt2, folder, batch), tp.logits(both, name, batch), **tp.CLOSE)
    folder = unpack(model, "b", tmp_path / "slices")
    torch.testing.assert_close(tp.alone(tiny.tiny_gpt2, folder, batch), tp.logits(model, "b", batch), **tp.CLOSE)


def test_generate_serves_names_with_beams(tmp_path):
    lora = {"method": "lora", "r": 2, "alpha": 8.0}
    given = {name: tp.saved(tmp_path / name, tiny.tiny_gpt2, seed, **lora) for seed, name in enumerate("ab")}
    model = pack(tiny.tiny_gpt2(), given)
    batch = {k: v[:2, :4] for k, v in tp.inputs(model).items()}
    options = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False, "eos_token_id": None}
    with use_experts(model, ["b", "a"]):
        both = model.generate(**batch, **options)
    for row, name in enumerate(("b", "a")):
        own = load_adamix(tiny.tiny_gpt2(), given[name]).eval()
        want = own.generate(**{k: v[row : row + 1] for k, v in batch.items()}, **options)
        assert torch.equal(both[row : row + 1], want)


def test_names_come_and_go_in_place(tmp_path):
    build, given = folders(tmp_path, "bert")
    late = {name: given.pop(name) for name in ("notes", "mails")}
    model = pack(build(), {**given, "mails": late["mails"]}, capacity=5, max_rank=9)
    addresses = {name: p.data_ptr() for name, p in model.named_parameters()}
    batch = tp.inputs(model)
    add_expert(model, "notes", late["notes"])
    want = tp.alone(build, late["notes"], batch, 2)
    torch.testing.assert_close(tp.logits(model, "notes", batch)[:, :2], want, **tp.CLOSE)
    before = tp.logits(model, "leases", batch)
    replace_expert(model, "notes", late["mails"])  # three labels now
    want = tp.alone(build, late["mails"], batch, 3)
    torch.testing.assert_close(tp.logits(model, "notes", batch), want, **tp.CLOSE)
    remove_expert(model, "patents")
    with pytest.raises(ValueError, match="index: got the name 'patents', expected leases, mails, notes"):
        tp.logits(model, "patents", batch)
    with pytest.raises(ValueError, match="name: got 'patents', expected one of leases, mails, notes"):
        unpack(model, "patents", "nowhere")
    for number in range(2):
        add_expert(model, f"more{number}", late["notes"])
    with pytest.raises(ValueError, match=r"name: got 'x' for a pack that is full \(5 slots\)"):
        add_expert(model, "x", late["notes"])
    with pytest.raises(ValueError, match="name: got 'mails', which the pack has"):
        add_expert(model, "mails", late["notes"])
    assert torch.equal(tp.logits(model, "leases", batch), before)
    assert addresses == {name: p.data_ptr() for name, p in model.named_parameters()}


def test_a_compiled_forward_is_compiled_once_whatever_the_names(tmp_path):
    build, given = folders(tmp_path, "bert")
    model = pack(build(), given)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    batch = tp.inputs(model)
    names, addresses = list(given), set()
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        for turn in range(4):
            if turn == 2:
                replace_expert(model, "notes", given["leases"])
            if turn == 3:
                remove_expert(model, "notes")
                add_expert(model, "again", given["notes"])
                names = [*names[:3], "again"]
            chosen = [names[(turn + n) % 4] for n in range(6)]
            with use_experts(model, chosen):
                address = model.adamix.router.experts.data_ptr()
                out = compiled(**batch).logits
                want = model(**batch).logits
            torch.testing.assert_close(out, want, **tp.CLOSE)
            addresses.add(address)
    assert len(addresses) == 1
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_pack_is_saved_whole_and_comes_back(tmp_path):
    build, given = folders(tmp_path, "bert")
    model = pack(build(), given, capacity=6, max_rank=11, max_labels=4)
    batch = tp.inputs(model)
    folder = save_pack(model, tmp_path / "pack")
    assert sorted(p.suffix for p in folder.iterdir()) == [".json"] + [".safetensors"] * 4
    again = load_pack(build(), folder)
    assert again.adamix.pack.capacity == 6
    assert list(again.adamix.pack.entries) == list(given)
    names = ["patents", "leases", "mails", "notes", "leases", "mails"]
    assert torch.equal(tp.logits(again, names, batch), tp.logits(model, names, batch))
    assert tp.logits(again, names, batch).shape == (6, 4)
    remove_expert(again, "leases")
    save_pack(again, folder)  # the file of the name that went is gone
    assert len(list(folder.glob("*.safetensors"))) == 3
    third = load_pack(build(), folder)
    add_expert(third, "leases", given["leases"])
    assert torch.equal(tp.logits(third, names, batch), tp.logits(model, names, batch))


@pytest.mark.parametrize("name", ["leases", "mails"])
def test_an_unpacked_name_is_a_checkpoint(name, tmp_path):
    build, given = folders(tmp_path, "bert")
    model = pack(build(), given)
    batch = tp.inputs(model)
    labels = model.adamix.pack.entries[name].labels
    folder = unpack(model, name, tmp_path / "out")
    want = tp.logits(model, name, batch)[:, : len(labels)]
    torch.testing.assert_close(tp.alone(build, folder, batch, len(labels)), want, **tp.CLOSE)
    config = json.loads((folder / "adamix_checkpoint.json").read_text())["base_model"]["config"]
    assert config["id2label"] == {str(n): label for n, label in enumerate(labels)}
    again = pack(build(), {name: folder})
    torch.testing.assert_close(tp.logits(again, name, batch)[:, : len(labels)], want, **tp.CLOSE)
    own = load_adamix(build(num_labels=len(labels)), folder)
    if name == "mails":
        export_peft(own, tmp_path / "peft")
        peft = pack(build(), {"p": tmp_path / "peft"})
        torch.testing.assert_close(tp.logits(peft, "p", batch)[:, : len(labels)], want, **tp.CLOSE)
    with pytest.raises(ValueError, match="model: got a pack, expected one adaptation to save"):
        save_adamix(model, tmp_path / "x")
    with pytest.raises(ValueError, match="expected one adaptation to merge"):
        merge(model)


def wrong(root):
    """(what is wrong, the folder or its maker, what the message says)"""
    build = tiny.tiny_bert
    good = tp.saved(root / "good", build, 1, labels=TWO, bottleneck=4)
    cut = shutil.copytree(good, root / "cut")
    file = next(cut.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-7])
    flipped = shutil.copytree(good, root / "flipped")
    file = next(flipped.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    edited = shutil.copytree(good, root / "edited")
    text = (edited / "adamix_checkpoint.json").read_text().replace('"bottleneck": 4', '"bottleneck": 5', 1)
    (edited / "adamix_checkpoint.json").write_text(text)
    (root / "empty").mkdir()
    other = tp.saved(root / "roberta", tiny.tiny_roberta, 1, labels=TWO)
    lora = tp.saved(root / "lora", build, 1, labels=TWO, method="lora", target_modules=["output.dense"])
    relu = tp.saved(root / "relu", build, 1, labels=TWO, bottleneck=4, activation="relu")
    nan = adapt(build(), AdaMixConfig(bottleneck=4))
    tp.randomise(nan, 1).classifier.weight.data[0, 0] = torch.nan
    nan = save_adamix(nan, root / "nan")
    return good, {
        "no folder": (root / "nowhere", r"bad: folder: got .*nowhere', no such folder"),
        "empty": (root / "empty", "bad: folder: got .* holds neither adamix_checkpoint.json nor adapter_config.json"),
        "cut": (cut, "bad: .*bytes, expected .*truncated"),
        "flipped": (flipped, "bad: .*SHA-256 .*corrupt"),
        "edited": (edited, "bad: .*adamix_checkpoint.json: got SHA-256"),
        "another base": (other, "bad: model: got a BertForSequenceClassification with model_type = 'bert'"),
        "adapter and lora": (lora, r"layer.0.output.dense: got an adapter of 'good' and a LoRA of 'bad'"),
        "activations": (relu, "got the activations 'gelu' of 'good' and 'relu' of 'bad'"),
        "not finite": (nan, "bad: classifier.weight: got values that are not finite"),
    }


def test_a_wrong_folder_is_named_and_changes_nothing(tmp_path):
    good, cases = wrong(tmp_path)
    bare, packed = tiny.tiny_bert(), pack(tiny.tiny_bert(), {"good": good}, capacity=2)
    before, packed_before = tp.state_of(bare), tp.state_of(packed)
    for folder, message in cases.values():
        with pytest.raises(ValueError, match=message):
            pack(bare, {"good": good, "bad": folder})
        tp.same_state(tp.state_of(bare), before)
        with pytest.raises(ValueError, match="bad: "):
            add_expert(packed, "bad", folder)
        tp.same_state(tp.state_of(packed), packed_before)
        assert list(packed.adamix.pack.entries) == ["good"]
    rank = tp.saved(tmp_path / "rank", tiny.tiny_bert, 1, labels=TWO, bottleneck=5)
    with pytest.raises(ValueError, match=r"bad: .*got rank 5, expected at most 4.*pack\(..., max_rank=5\)"):
        add_expert(packed, "bad", rank)
    labels = tp.saved(tmp_path / "labels", tiny.tiny_bert, 1, labels=THREE, bottleneck=4)
    with pytest.raises(ValueError, match=r"bad: classifier: got 3 labels, expected at most 2.*max_labels=3"):
        add_expert(packed, "bad", labels)
    where = tp.saved(tmp_path / "where", tiny.tiny_bert, 1, labels=TWO, method="lora", r=2)
    with pytest.raises(ValueError, match=r"bad: bert.encoder.*query: got a folder that changes it"):
        add_expert(packed, "bad", where)
    tp.same_state(tp.state_of(packed)[:5], packed_before[:5])
    with pytest.raises(ValueError, match="model: got a BertForSequenceClassification that is adapted already"):
        pack(packed, {"good": good})


def test_bad_arguments_are_named(tmp_path):
    good = tp.saved(tmp_path / "good", tiny.tiny_bert, 1, labels=TWO, bottleneck=4)
    bare = tiny.tiny_bert()
    for options, message in {
        "name: got 'nearest', which use_experts means otherwise": {"folders": {"nearest": good}},
        "name: got 'a/b', expected": {"folders": {"a/b": good}},
        "folders: got 0, expected 1 to 256": {"folders": {}},
        "capacity: got 1 for 2 folders": {"folders": {"a": good, "b": good}, "capacity": 1},
        "max_rank: got 0": {"folders": {"a": good}, "max_rank": 0},
    }.items():
        with pytest.raises(ValueError, match=options):
            pack(bare, **message)
    with pytest.raises(TypeError, match="folders: got list, expected a mapping"):
        pack(bare, [good])
    model = pack(bare, {"a": good})
    batch = tp.inputs(model)
    with pytest.raises(ValueError, match="use_experts: got a forward of a pack without names"):
        model(**batch)
    with pytest.raises(TypeError, match="for a pack, expected a name"), use_experts(model, [0]):
        pass
    two = pack(tiny.tiny_bert(), {"a": good, "b": good})
    with pytest.raises(ValueError, match="use_experts index: got 4 rows for a batch of 6"):
        tp.logits(two, ["a", "b", "a", "b"], batch)
    for packed, names in ((two, ["a", "b"]), (two, ["a"]), (model, ["a", "a"])):  # as if two passes, or beams
        with pytest.raises(ValueError, match=f"use_experts: got {len(names)} names for a batch of 6"):
            tp.logits(packed, names, batch)
    with pytest.raises(ValueError, match="model: got a BertForSequenceClassification that is no pack"):
        add_expert(tiny.tiny_bert(), "a", good)
