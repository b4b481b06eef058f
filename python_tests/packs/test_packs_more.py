"""Packs: what PEFT folders are refused, many names, threads, copies, odd heads."""

import copy
import io
import json
import shutil
import threading

import pytest
import tiny
import tiny_packs as tp
import torch
from safetensors.torch import load_file, save_file
from two_writers import write_while_locked

from adamix_kernels import AdaMixConfig, adapt, add_expert, load_pack, pack, replace_expert, save_adamix, save_pack
from adamix_kernels.packs.reading import read_source
from adamix_kernels.tasks import load

TWO = ["no", "yes"]


def lora_folder(root, seed=1, **config):
    pytest.importorskip("peft")
    tp.peft_saved(root, tiny.tiny_bert(), seed, r=2, target_modules=["query"], task_type="SEQ_CLS", **config)
    return root


def test_what_a_peft_folder_says_that_a_pack_cannot_is_refused_by_name(tmp_path):
    good = lora_folder(tmp_path / "good")
    values = json.loads((good / "adapter_config.json").read_text())
    tensors = load_file(good / "adapter_model.safetensors")
    query = "base_model.model.bert.encoder.layer.0.attention.self.query"
    bare = tiny.tiny_bert()

    def refused(message, change=None, weights=None):
        folder = shutil.copytree(good, tmp_path / "bad")
        (folder / "adapter_config.json").write_text(json.dumps({**values, **(change or {})}))
        save_file(tensors | (weights or {}) if weights is None or weights else {}, folder / "adapter_model.safetensors")
        try:
            with pytest.raises(ValueError, match=message):
                pack(bare, {"bad": folder})
        finally:
            shutil.rmtree(folder)

    refused("bad: .*got use_dora=True, which a pack cannot hold", {"use_dora": True})
    refused("bad: .*got bias='all', lora_bias=True", {"bias": "all", "lora_bias": True})
    refused("bad: .*got trainable_token_indices=", {"trainable_token_indices": [1]})
    refused(
        "bad: .*got init_lora_weights='pissa_niter_4', which changed the base", {"init_lora_weights": "pissa_niter_4"}
    )
    refused("bad: .*got peft_type 'IA3', expected 'LORA'", {"peft_type": "IA3"})
    refused("bad: .*got r=0, expected a number above 0", {"r": 0})
    for patterns in ({"(": 3}, ["query"], {"query": "x"}):
        refused("bad: .*got rank_pattern=.*, expected regular expressions with numbers", {"rank_pattern": patterns})
    refused("bad: .*got modules_to_save=3, expected names in a list", {"modules_to_save": 3})
    refused("bad: .*got rank 2, expected 3, as in adapter_config.json", {"r": 3})
    refused(r"bad: .*got .*lora_B.bias', expected a LoRA of linear", None, {f"{query}.lora_B.bias": torch.zeros(32)})
    refused(
        "bad: .*got .*lora_embedding_A', expected", None, {"base_model.model.bert.e.lora_embedding_A": torch.zeros(2)}
    )
    refused(
        "bad: .*got 'bert.pooler.x', which modules_to_save", None, {"base_model.model.bert.pooler.x": torch.ones(1)}
    )
    refused("got lora_A and lora_B of shapes", None, {f"{query}.lora_A.weight": torch.zeros(2, 32, 1)})
    refused("bad: bert.*query: got tensors of shapes", None, {f"{query}.lora_A.weight": torch.zeros(2, 31)})
    refused(
        "bad: .*query: got a LoRA of 31 columns|lora_B of 31 rows", None, {f"{query}.lora_B.weight": torch.ones(31, 2)}
    )
    refused("bad: nowhere: got a BertFor.* without such a linear layer", None, {
        "base_model.model.nowhere.lora_A.weight": torch.ones(2, 3),
        "base_model.model.nowhere.lora_B.weight": torch.ones(4, 2),
    })  # fmt: skip
    refused(
        "bad: score: got a BertFor.* without such a module", None, {"base_model.model.score.weight": torch.ones(2, 32)}
    )
    (good / "adapter_model.safetensors").rename(good / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"adapter_model.bin is a pickle, which is not opened"):
        pack(bare, {"bad": good})


def test_an_old_merged_lora_and_two_poolings_are_refused(tmp_path):
    from adamix_kernels.models._files import unsealed, write_sealed_json
    from adamix_kernels.models.pooling import set_pooling

    old = tp.saved(tmp_path / "old", tiny.tiny_bert, 1, labels=TWO, method="lora")
    path = old / "adamix_checkpoint.json"
    header = unsealed(json.loads(path.read_text()), path)
    for facts in header["layers"].values():
        facts.pop("factors")
    write_sealed_json(path, header)
    with pytest.raises(ValueError, match=r"old: .*without its factors, expected the unmerged checkpoint"):
        pack(tiny.tiny_bert(), {"old": old})
    mean = tiny.tiny_bert()
    set_pooling(mean, "mean")
    mean = save_adamix(adapt(mean, AdaMixConfig()), tmp_path / "mean")
    model = tp.saved(tmp_path / "model", tiny.tiny_bert, 1, labels=TWO)
    with pytest.raises(ValueError, match=r"got heads that read 'mean' \(m\) and 'model' \(o\)"):
        pack(tiny.tiny_bert(), {"m": mean, "o": model})
    packed = pack(tiny.tiny_bert(), {"m": mean})
    batch = tp.inputs(packed)
    torch.testing.assert_close(tp.logits(packed, "m", batch), tp.alone(tiny.tiny_bert, mean, batch), **tp.CLOSE)
    with pytest.raises(ValueError, match=r"m: folder: got a head that reads|m: model: got"):
        replace_expert(pack(tiny.tiny_bert(), {"m": model}), "m", mean)


def test_two_hundred_and_fifty_six_names(tmp_path):
    given = [tp.saved(tmp_path / str(n), tiny.tiny_bert, n, labels=TWO, bottleneck=2) for n in range(3)]
    model = pack(tiny.tiny_bert(), {f"name{n}": given[n % 3] for n in range(256)})
    batch = tp.inputs(model)
    numbers = [255, 0, 128, 1, 77, 254]
    mixed = tp.logits(model, [f"name{n}" for n in numbers], batch)
    for row, number in enumerate(numbers):
        want = tp.alone(tiny.tiny_bert, given[number % 3], batch)[row]
        torch.testing.assert_close(mixed[row], want, **tp.CLOSE)
    with pytest.raises(ValueError, match="folders: got 257, expected 1 to 256"):
        pack(tiny.tiny_bert(), {f"name{n}": given[0] for n in range(257)})


def test_two_threads_serve_while_a_third_swaps(tmp_path):
    given = {n: tp.saved(tmp_path / n, tiny.tiny_bert, seed, labels=TWO, bottleneck=3) for seed, n in enumerate("abc")}
    model = pack(tiny.tiny_bert(), {n: given[n] for n in "ab"})
    batch = tp.inputs(model)
    want = {n: tp.alone(tiny.tiny_bert, folder, batch) for n, folder in given.items()}
    stop, wrong, served = threading.Event(), [], [0, 0]

    def serve(who, name, allowed):
        while not stop.is_set():
            got = tp.logits(model, [name] * 6, batch)
            served[who] += 1
            if not any(torch.allclose(got, want[n], rtol=1e-5, atol=1e-6) for n in allowed):
                wrong.append(name)

    threads = [
        threading.Thread(target=serve, args=(0, "a", "a")),
        threading.Thread(target=serve, args=(1, "b", "bc")),  # never a mixture of both
    ]
    for thread in threads:
        thread.start()
    for turn in range(20):
        replace_expert(model, "b", given["cb"[turn % 2]])
    stop.set()
    for thread in threads:
        thread.join(60)
    assert not wrong
    assert min(served) > 0
    torch.testing.assert_close(tp.logits(model, "b", batch), want["b"], **tp.CLOSE)


def test_a_pack_is_copied_and_pickled(tmp_path):
    folder = tp.saved(tmp_path / "a", tiny.tiny_roberta, 1, labels=TWO, method="lora", r=2)
    model = pack(tiny.tiny_roberta(), {"a": folder, "b": folder})
    batch = tp.inputs(model)
    want = tp.logits(model, ["a", "b"] * 3, batch)
    assert torch.equal(tp.logits(copy.deepcopy(model), ["a", "b"] * 3, batch), want)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(tp.logits(torch.load(file, weights_only=False), ["a", "b"] * 3, batch), want)
    half = copy.deepcopy(model).bfloat16()
    assert tp.logits(half, ["a", "b"] * 3, batch).dtype == torch.bfloat16


def test_norms_and_token_heads_are_kept_one_a_name(tmp_path):
    import transformers

    def build(num_labels=2):
        return tiny.tiny_bert(num_labels, model_class=transformers.BertForTokenClassification)

    given = {
        name: tp.saved(
            tmp_path / name,
            build,
            seed,
            method="lora",
            r=2,
            modules_to_save=["classifier", "attention.output.LayerNorm"],
        )
        for seed, name in enumerate("ab")
    }
    model = pack(build(), given)
    batch = {k: v for k, v in tiny.batch_for(model).items() if k != "labels"}
    names = ["b", "a", "a", "b"]
    mixed = tp.logits(model, names, batch)
    for name, folder in given.items():
        rows = [n for n, chosen in enumerate(names) if chosen == name]
        torch.testing.assert_close(mixed[rows], tp.alone(build, folder, batch)[rows], **tp.CLOSE)
    words = tp.saved(tmp_path / "w", build, 1, method="lora", r=2, modules_to_save=["word_embeddings"])
    with pytest.raises(ValueError, match="got a Embedding among the modules trained whole"):
        pack(build(), {"w": words})


def test_load_finds_a_pack_and_its_base(tmp_path):
    from adamix_kernels import save_pack

    base = tiny.tiny_bert()
    base.bert.save_pretrained(tmp_path / "base")

    def build(num_labels=2):
        return type(base).from_pretrained(tmp_path / "base", num_labels=num_labels)

    given = {
        n: tp.saved(tmp_path / n, build, s, labels=["x", "y", "z"][: 2 + s], bottleneck=2) for s, n in enumerate("ab")
    }
    model = pack(build(), given)
    batch = tp.inputs(model)
    folder = save_pack(model.eval(), tmp_path / "pack")
    again, tokenizer = load(folder)
    assert tokenizer is None
    assert torch.equal(tp.logits(again, list("abbaba"), batch), tp.logits(model, list("abbaba"), batch))
    for names, told in (
        (["b", "c"], "names: got 'c', expected some of a, b"),
        ("b", "names: got 'b'"),
        ([], "names: "),
    ):
        with pytest.raises(ValueError, match=told):
            load(folder, names=names)
    with pytest.raises(ValueError, match=r"names: got \['a'\] for .*, which is no pack"):
        load(given["a"], names=["a"])
    for file in folder.glob("*.safetensors"):  # of the other name, which is not opened
        if file.name != json.loads((folder / "adamix_pack.json").read_text())["names"]["b"]["tensors"]["file"]:
            file.unlink()
    one, _ = load(folder, names=["b", "b"])
    assert (list(one.adamix.pack.entries), one.adamix.pack.capacity) == (["b"], 1)
    want = tp.logits(model, ["b"] * 6, batch)
    torch.testing.assert_close(tp.logits(one, ["b"] * 6, batch), want, rtol=1e-5, atol=1e-6)
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(ValueError, match=r"model: got .*base. as the base of .*: --model, in Python model="):
        load(folder)


def test_two_writers_of_one_folder_wait_for_each_other(tmp_path, caplog):
    folders = [tp.saved(tmp_path / str(seed), tiny.tiny_bert, seed, bottleneck=4) for seed in (1, 2)]
    models = [pack(tiny.tiny_bert(), {"a": folder}) for folder in folders]
    out = save_pack(models[0], tmp_path / "out")
    write_while_locked(out, caplog, save_pack, models[1], out)
    batch = tp.inputs(models[1])
    assert torch.equal(tp.logits(load_pack(tiny.tiny_bert(), out), "a", batch), tp.logits(models[1], "a", batch))


@pytest.mark.parametrize("change", [add_expert, replace_expert])
def test_others_are_served_while_a_folder_is_read(change, tmp_path, monkeypatch):
    folder = tp.saved(tmp_path / "a", tiny.tiny_bert, 1, bottleneck=4)
    model = pack(tiny.tiny_bert(), {"a": folder}, capacity=2)
    batch = tp.inputs(model)
    reading, go_on = threading.Event(), threading.Event()

    def slow(*given):
        reading.set()
        assert go_on.wait(20)
        return read_source(*given)

    monkeypatch.setattr("adamix_kernels.packs.pack.read_source", slow)
    name = "b" if change is add_expert else "a"
    changing = threading.Thread(target=change, args=(model, name, folder))
    changing.start()
    assert reading.wait(20)
    served = threading.Thread(target=tp.logits, args=(model, "a", batch), daemon=True)
    served.start()
    served.join(10)
    try:
        assert not served.is_alive()
    finally:
        go_on.set()
        changing.join()
    assert torch.equal(tp.logits(model, name, batch), tp.logits(model, "a", batch))
