"""Names by content: the nearest centroid, its threshold, and Arrow."""

import pytest
import tiny
import tiny_packs as tp
import torch

from adamix_kernels import (
    AdaMixConfig,
    adapt,
    load_adamix,
    merge,
    nearest,
    pack,
    replace_expert,
    save_adamix,
    save_pack,
    store_centroid,
    unpack,
    use_experts,
)
from adamix_kernels.models.centroid import Centroid
from adamix_kernels.packs.route import Nearest

TWO = ["no", "yes"]
NAMES = ("low", "middle", "high")


def texts(domain, count, seed):
    """Token ids of one domain: mostly its own third of the vocabulary. Padded to different lengths."""
    generator = torch.Generator().manual_seed(100 * seed + domain)
    own = torch.randint(3 + 20 * domain, 23 + 20 * domain, (count, 12), generator=generator)
    other = torch.randint(3, 63, (count, 12), generator=generator)
    ids = torch.where(torch.rand(count, 12, generator=generator) < 0.95, own, other)
    lengths = torch.randint(5, 13, (count, 1), generator=generator)
    mask = (torch.arange(12) < lengths).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def trained(root, domain, method="adapter"):
    config = AdaMixConfig(method=method, num_experts=2, bottleneck=3, r=2)
    model = tp.randomise(adapt(tiny.tiny_bert(), config), domain)
    store_centroid(model, [texts(domain, 16, seed) for seed in range(4)])
    return save_adamix(merge(model), root / NAMES[domain])


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    root = tmp_path_factory.mktemp("domains")
    return {NAMES[d]: trained(root, d, ("adapter", "lora")[d % 2]) for d in range(3)}


def mixed(seed=9):
    parts = [texts(d, 20, seed) for d in range(3)]
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    batch = {name: torch.cat([part[name] for part in parts])[order] for name in parts[0]}
    return batch, [NAMES[int(n) // 20] for n in order]


def test_each_text_finds_its_name(given):
    model = pack(tiny.tiny_bert(), given)
    batch, wanted = mixed()
    found = nearest(model, **batch)
    right = sum(name == want for name, want in zip(found.names, wanted, strict=True))
    assert right >= 54  # 90 %; by chance 20
    routed = tp.logits(model, "nearest", batch)
    assert model.adamix.pack.last == found
    assert torch.equal(routed, tp.logits(model, found.names, batch))
    model.train()
    again = nearest(model, **batch)
    assert again.names == found.names
    assert model.training


def test_a_name_may_be_chosen_among_some(given):
    model = pack(tiny.tiny_bert(), given)
    batch, _ = mixed()
    some = NAMES[:2]
    assert set(nearest(model, names=some, **batch).nearest) <= set(some)
    found = [nearest(model, names=[name], **batch).similarity for name in NAMES]
    assert nearest(model, **batch).similarity == pytest.approx([max(three) for three in zip(*found, strict=True)])
    for wrong in ([], ["none"]):
        with pytest.raises(ValueError, match=r"names: got \['?(none)?'?\], expected some of"):
            nearest(model, names=wrong, **batch)


def test_the_nearest_of_several_lengths_are_none_where_there_are_no_texts():
    none = Nearest([], [], [])
    assert Nearest.best_of([none, none]) == none


def test_the_vector_is_that_of_the_frozen_encoder(given):
    batch, _ = mixed()
    base = tiny.tiny_bert()
    with torch.no_grad():
        states = base.bert(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    vectors = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1))
    model = pack(tiny.tiny_bert(), given)
    means = torch.stack([entry.centroid.mean for entry in model.adamix.pack.entries.values()])
    cosines, best = (vectors @ means.T).max(1)
    found = nearest(model, **batch)
    assert found.nearest == [list(given)[n] for n in best]
    torch.testing.assert_close(torch.tensor(found.similarity), cosines, rtol=0, atol=1e-5)
    own = torch.cat([torch.nn.functional.normalize(_means(base, texts(0, 16, seed))) for seed in range(4)])
    centroid = model.adamix.pack.entries["low"].centroid
    torch.testing.assert_close(centroid.mean, torch.nn.functional.normalize(own.sum(0), dim=0), rtol=0, atol=1e-5)
    assert centroid.texts == 64
    assert centroid.low == pytest.approx((own @ centroid.mean).quantile(0.01).item(), abs=1e-5)


def _means(base, batch):
    with torch.no_grad():
        states, mask = base.bert(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
    return (states * mask).sum(1) / mask.sum(1)


def test_a_threshold_refuses_and_says_which(given):
    model = pack(tiny.tiny_bert(), given)
    batch, _ = mixed()
    all_of_them = nearest(model, **batch)
    bound = sorted(all_of_them.similarity)[30]
    found = nearest(model, threshold=bound, **batch)
    assert sum(name is None for name in found.names) == 30
    assert found.nearest == all_of_them.nearest
    low = {name: entry.centroid.low for name, entry in model.adamix.pack.entries.items()}
    auto = nearest(model, threshold="auto", **batch)
    assert auto.names == [n if s >= low[n] else None for n, s in zip(auto.nearest, auto.similarity, strict=True)]
    first = found.names.index(None)
    with pytest.raises(ValueError, match=rf"samples below the threshold .*: {first} \({found.nearest[first]} 0\.\d+\)"):
        tp.logits(model, "nearest", batch, threshold=bound)
    assert torch.equal(tp.logits(model, "nearest", batch, threshold=-1.0), tp.logits(model, "nearest", batch))
    for wrong in (2, "often", True):
        with pytest.raises(ValueError, match="threshold: got"):
            nearest(model, threshold=wrong, **batch)
    with pytest.raises(ValueError, match=r'threshold: got 0.5, expected it with "nearest" alone'):
        tp.logits(model, "low", batch, threshold=0.5)


def test_centroids_travel_and_missing_ones_are_named(given, tmp_path):
    model = pack(tiny.tiny_bert(), given)
    batch, _ = mixed()
    found = nearest(model, **batch)
    own = load_adamix(tiny.tiny_bert(), unpack(model, "middle", tmp_path / "middle"))
    saved = model.adamix.pack.entries["middle"].centroid
    torch.testing.assert_close(own.adamix.centroid.mean, saved.mean, rtol=0, atol=1e-8)
    from adamix_kernels import load_pack

    assert nearest(load_pack(tiny.tiny_bert(), save_pack(model, tmp_path / "pack")), **batch).names == found.names
    bare = tp.saved(tmp_path / "bare", tiny.tiny_bert, 1, labels=TWO, bottleneck=3)
    replace_expert(model, "low", bare)
    with pytest.raises(ValueError, match=r"got 'low' without a centroid .*store_centroid"):
        nearest(model, **batch)
    with pytest.raises(ValueError, match="got 'low' without a centroid"), use_experts(model, "nearest"):
        pass
    store_centroid(model, [texts(0, 16, seed) for seed in range(4)], name="low")
    assert nearest(model, **batch).names == found.names
    with pytest.raises(ValueError, match="name: got None for a pack"):
        store_centroid(model, [texts(0, 4, 0)])
    with pytest.raises(ValueError, match="name: got 'x', expected one of"):
        store_centroid(model, [texts(0, 4, 0)], name="x")
    with pytest.raises(ValueError, match="name: got 'x' for a model of one adaptation"):
        store_centroid(own, [texts(0, 4, 0)], name="x")
    with pytest.raises(ValueError, match="batches: got 0 texts"):
        store_centroid(own, [])
    with pytest.raises(ValueError, match=r"h\.json: got a centroid that is none"):
        Centroid.read("h.json", {"mean": ["x"]})


def test_generate_keeps_the_names_of_the_first_token(tmp_path):
    folders = {}
    for seed, name in enumerate(("a", "b")):
        model = adapt(tiny.tiny_gpt2(), AdaMixConfig(method="lora", r=2, num_experts=2))
        tp.randomise(model, seed)
        store_centroid(model, [texts(2 * seed, 8, 0)])
        folders[name] = save_adamix(model, tmp_path / name)
    model = pack(tiny.tiny_gpt2(), folders)
    batch = {n: torch.cat([texts(d, 2, 5)[n][:, :5] for d in (2, 0)]) for n in ("input_ids", "attention_mask")}
    chosen = nearest(model, **batch).names
    assert set(chosen) == {"a", "b"}
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2, "eos_token_id": None}
    with use_experts(model, "nearest"):
        routed = model.generate(**batch, **options)
    with use_experts(model, chosen):
        assert torch.equal(routed, model.generate(**batch, **options))


def test_arrow_sends_each_token_to_the_lora_whose_input_it_is(tmp_path):
    lora = {"method": "lora", "r": 3, "alpha": 6.0, "num_experts": 2}
    given = {name: tp.saved(tmp_path / name, tiny.tiny_gpt2, seed, **lora) for seed, name in enumerate("abc")}
    model = pack(tiny.tiny_gpt2(), given, capacity=4)
    batch = tp.inputs(model)
    path = model.adamix.paths[0]
    layer = model.get_submodule(path)
    seen = {}
    layer.register_forward_hook(lambda _module, args, _out: seen.update(x=args[0], index=model.adamix.router.experts))
    tp.logits(model, "arrow", batch)
    vectors = []
    for slot in range(3):
        lora_a, lora_b = layer.lora_a[slot].double().view(2, 3, -1), layer.lora_b[slot].double().view(2, -1, 3)
        update = torch.cat([b @ a for a, b in zip(lora_a, lora_b, strict=True)])  # [N', K] of both slices
        vectors.append(torch.linalg.svd(update).Vh[0])
    likeness = (seen["x"].double() @ torch.stack(vectors).T).abs()
    assert torch.equal(seen["index"], likeness.argmax(-1))
    assert len(seen["index"].unique()) > 1
    with pytest.raises(ValueError, match="use_experts: got a forward of a pack without names"):
        model(**batch)
    heads = tp.saved(tmp_path / "h", tiny.tiny_bert, 1, labels=TWO, method="lora")
    with pytest.raises(ValueError, match=r"got 'arrow' for a pack with heads \(classifier\)"):
        tp.logits(pack(tiny.tiny_bert(), {"h": heads}), "arrow", batch)
