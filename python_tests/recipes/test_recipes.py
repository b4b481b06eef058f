"""Recipes as files, methods by name, metrics, result rows, and the table and plots made of them."""

import json
import re
import shutil
from pathlib import Path

import pytest

from adamix_kernels import AdaMixConfig
from adamix_kernels._extras import install_line
from adamix_kernels.recipes import (
    append_row,
    expand_methods,
    load_recipe,
    parse_method,
    read_rows,
    recipe_names,
    run_recipe,
)
from adamix_kernels.recipes.methods import ablations, epochs, learning_rate
from adamix_kernels.recipes.metrics import TOKENS, _caption, label_scores, text_scores
from adamix_kernels.recipes.paired import differences, differences_table, t_point, write_differences
from adamix_kernels.recipes.summary import group_rows, markdown, write_summary
from adamix_kernels.recipes.training import training_arguments

ROOT = Path(__file__).resolve().parents[2]
GLUE = ("mnli", "qnli", "sst2", "qqp", "mrpc", "cola", "rte", "stsb")


def test_every_experiment_of_the_paper_has_a_recipe():
    wanted = {f"glue/{model}/{task}" for model in ("bert-base", "roberta-large") for task in GLUE}
    wanted |= {f"fewshot/roberta-large/{task}" for task in ("mnli", "rte", "qqp", "sst2", "subj", "mpqa")}
    wanted |= {f"nlg/{method}/{task}" for method in ("lora", "adapter") for task in ("e2e", "webnlg", "dart")}
    assert set(recipe_names()) == wanted | {"evidence/minilm"}
    for name in recipe_names():
        recipe = load_recipe(name)
        assert recipe.name == name
        assert recipe.source
        assert all(parse_method(m) for m in recipe.default_methods)


def test_the_docs_name_every_recipe():
    named = set()
    for cell in re.findall(r"`([^`]+)`", (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")):
        stem, brace, tasks = cell.partition("{")
        named |= {stem + task for task in tasks.rstrip("}").split(",")} if brace else {cell}
    assert set(recipe_names()) <= named


@pytest.mark.parametrize(
    ("name", "training", "adamix"),
    [
        ("glue/bert-base/mnli", {"learning_rate": 4e-4, "num_train_epochs": 40}, {"num_experts": 4, "bottleneck": 48}),
        ("glue/roberta-large/rte", {"learning_rate": 3e-4, "num_train_epochs": 20}, {"bottleneck": 16}),
        ("nlg/lora/e2e", {"warmup_steps": 2000, "num_train_epochs": 20}, {"num_experts": 8, "r": 4, "alpha": 32.0}),
        ("nlg/lora/webnlg", {"warmup_steps": 2500, "num_train_epochs": 25}, {"dropout": 0.1}),
        ("nlg/lora/dart", {"weight_decay": 0.0, "label_smoothing_factor": 0.0}, {"dropout": 0.0}),
        ("nlg/adapter/dart", {"num_train_epochs": 20}, {"bottleneck": 8, "consistency_weight": 100.0}),
    ],
)
def test_published_settings(name, training, adamix):
    recipe = load_recipe(name)
    assert {k: recipe.training[k] for k in training} == training
    config = AdaMixConfig.from_dict(recipe.adamix)
    assert {k: getattr(config, k) for k in adamix} == adamix
    assert (config.share, config.routing) == ("up", "batch")


def test_a_task_changes_its_family_and_nothing_else():
    stsb, cola = load_recipe("glue/bert-base/stsb"), load_recipe("glue/bert-base/cola")
    assert (stsb.regression, stsb.metrics, cola.regression, cola.metrics) == (
        True,
        ["pearson", "spearman"],
        False,
        ["matthews"],
    )
    assert stsb.training == cola.training
    rte = load_recipe("fewshot/roberta-large/rte")
    assert rte.prompt["words"] == {"Yes": ["entailment", "0"], "No": ["not_entailment", "1"]}
    assert (rte.shots, rte.seeds, rte.select) == (30, 5, "last")
    decoding = load_recipe("nlg/lora/e2e").generation
    assert (decoding["beams"], decoding["length_penalty"], decoding["no_repeat_ngram"]) == (10, 0.8, 4)


def test_a_recipe_of_ones_own(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(load_recipe("glue/bert-base/rte").changed({"adamix.num_experts": 8}).to_dict()))
    recipe = load_recipe(str(path))
    assert recipe.adamix["num_experts"] == 8
    assert recipe.changed({"training.num_train_epochs": 2}).training["learning_rate"] == 4e-4
    path.write_text('{"kind": "x"}')
    with pytest.raises(ValueError, match=r"mine.json: recipe: .* lacks \['model'"):
        load_recipe(str(path))
    with pytest.raises(ValueError, match="expected a JSON file or one of the names"):
        load_recipe("glue/bert-base/wnli")
    with pytest.raises(ValueError, match="unknown keys \\['colour'\\]"):
        recipe.changed({"colour": 1})
    with pytest.raises(ValueError, match="num_experts: got 0"):
        recipe.changed({"adamix.num_experts": 0})
    # Before anything is trained.
    with pytest.raises(ValueError, match=r"metrics: got \['bleu'\], expected some of accuracy"):
        recipe.changed({"metrics": ["bleu"]})
    for name, value in (("learning_rate", 0), ("num_train_epochs", "abc"), ("per_device_train_batch_size", None)):
        with pytest.raises(ValueError, match=f"training.{name}: got {value!r}, expected a number above 0"):
            recipe.changed({f"training.{name}": value})
    wrong = {"training": 3, "generation": 3, "evaluations": None, "methods": {"lora": 3}, "metrics": "accuracy"}
    for name, value in {**wrong, "model": None, "seeds": "x", "shots": -1, "max_tokens": True}.items():
        with pytest.raises(ValueError, match=rf"^{name}[.a-z]*: got .*, expected a (text|JSON|whole number)"):
            recipe.changed({name: value})
    path.write_text("[" * 200_000)
    with pytest.raises(ValueError, match=r"mine.json: maximum recursion depth"):
        load_recipe(str(path))
    with pytest.raises(ValueError, match="training: got no learning_rate, expected learning_rate, num_train_epochs"):
        run_recipe(recipe.changed({"training": {}}), [], [], tmp_path / "rows.jsonl")
    text = load_recipe("nlg/lora/e2e")
    for key, value in (("normalise", True), ("tokens", "bpe")):
        with pytest.raises(ValueError, match=f"generation: got .*{key}.*, expected some of beams"):
            text.changed({f"generation.{key}": value})


def test_methods_by_name_and_option():
    method = parse_method("adamix:routing=sample,num_experts=8,share=null")
    assert str(method) == "adamix:num_experts=8,routing=sample,share=null"
    assert dict(method.options)["share"] is None
    assert str(parse_method(str(method))) == str(method)
    for text, error, message in (
        ("adapter", ValueError, "expected one of full, head"),
        ("adamix:colour=1", ValueError, "unknown keys"),
        ("adamix:routing=expert", ValueError, "routing"),
        ("lora:rank=2", ValueError, r"\['rank'\]"),
        ("lora:r", ValueError, "option=value"),
        ("unipelt:parts=p", ValueError, "parts='p', expected one of ap, apl"),
    ):
        with pytest.raises(error, match=message):
            parse_method(text)


def test_groups_of_methods():
    recipe = load_recipe("glue/bert-base/rte")
    names = [str(m) for m in expand_methods(["baselines", "adamix", "ablations"], recipe)]
    assert names[:9] == ["full", "head", "bitfit", "pfeiffer", "houlsby", "prefix", "lora", "unipelt", "adamix"]
    assert names[9:] == [
        "adamix:consistency_weight=0", "adamix:share=null", "adamix:routing=sample", "adamix:routing=token",
        "adamix:num_experts=1", "adamix:num_experts=2", "adamix:num_experts=8",
        "adamix:bottleneck=24", "adamix:bottleneck=96",
    ]  # fmt: skip
    assert ablations(load_recipe("nlg/lora/e2e"))[-2:] == ["adamix:r=2", "adamix:r=8"]
    assert learning_rate(parse_method("full"), recipe) == 2e-5
    assert learning_rate(parse_method("pfeiffer"), recipe) == 4e-4


def test_scores_of_labels():
    pytest.importorskip("sklearn")
    scores = label_scores(["accuracy", "f1", "matthews"], [1, 1, 0, 0], [1, 0, 0, 0])
    assert scores.values == pytest.approx({"accuracy": 75.0, "f1": 200 / 3, "matthews": 100 / 3**0.5})
    assert scores.sources["f1"].startswith("scikit-learn ")
    pytest.importorskip("scipy")
    numbers = label_scores(["pearson", "spearman"], [1.0, 2.0, 4.0], [1.0, 2.0, 3.0])
    assert numbers.values == pytest.approx({"pearson": 98.198, "spearman": 100.0}, abs=1e-3)
    assert "no finite number" in label_scores(["pearson"], [1.0, 1.0, 1.0], [1.0, 2.0, 3.0]).missing["pearson"]
    three = [0, 1, 2, 2], [0, 1, 2, 1]
    assert label_scores(["f1"], *three, classes=3).values["f1"] == pytest.approx(100 * (1 + 2 / 3 + 2 / 3) / 3)


@pytest.mark.parametrize(
    ("name", "package", "same", "worse"),
    [
        ("bleu", "sacrebleu", 100.0, lambda v: v < 90),
        ("ter", "sacrebleu", 0.0, lambda v: v > 5),
        ("chrf", "sacrebleu", 100.0, lambda v: v < 95),
        ("rouge_l", "pycocoevalcap", 100.0, lambda v: v < 95),
        ("nist", "nltk", None, lambda v: v > 0),
        ("cider", "pycocoevalcap", 10.0, lambda v: v < 8),
    ],
)
def test_scores_of_texts(name, package, same, worse):
    pytest.importorskip(package)
    references = [["the blue place is in the north .", "a blue place in the north ."], ["a red pub serves good food ."]]
    texts = [refs[0] for refs in references]
    if same is not None:
        assert text_scores([name], texts, [[t] for t in texts]).values[name] == pytest.approx(same)
    other = text_scores([name], ["the north is a place .", texts[1]], references)
    assert worse(other.values[name])
    assert package.replace("_", "-") in other.sources[name]


def test_an_absent_library_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sacrebleu", None)
    scores = text_scores(["bleu"], ["a"], [["a"]])
    assert not scores.values
    assert scores.missing["bleu"] == f"needs sacrebleu: {install_line('recipes')}"
    with pytest.raises(ValueError, match="expected some of bleu, nist"):
        text_scores(["accuracy"], [], [])


def test_meteor_without_java_and_wordnet_says_what_it_needs(monkeypatch):
    pytest.importorskip("nltk")

    def lacking(*_args):
        raise LookupError("wordnet")

    monkeypatch.setattr("shutil.which", lambda _name: None)
    monkeypatch.setattr("nltk.translate.meteor_score.meteor_score", lacking)
    assert "needs pycocoevalcap and Java" in text_scores(["meteor"], ["a"], [["a"]]).missing["meteor"]


def test_rouge_without_its_first_library(monkeypatch):
    pytest.importorskip("rouge_score")
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    scores = text_scores(["rouge_l"], ["a b c"], [["a b c", "d"]])
    assert (scores.values, scores.sources["rouge_l"].split()[0]) == ({"rouge_l": 100.0}, "rouge-score")
    assert text_scores(["rouge_l"], ["c a b"], [["a b c", "d"]]).values["rouge_l"] < 95


@pytest.mark.skipif(shutil.which("java") is None, reason="METEOR 1.5 runs Java, and there is none here")
@pytest.mark.nightly
def test_meteor_is_its_authors_own():
    pytest.importorskip("pycocoevalcap")
    texts, references = ["the cats sat on a mat ."], [["a cat was sitting on the mat .", "no cat ."]]
    scores = text_scores(["meteor"], texts, references)
    # Stems and paraphrases count: of the same words in the same order none is exact but "on", "a", "mat".
    assert 25 < scores.values["meteor"] < 60
    assert scores.sources["meteor"].startswith("pycocoevalcap")


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("spaces", "The Mill's food, 5-star: £20.50."),
        ("words", "the mill ' s food , 5 - star : £ 20 . 50 ."),
        ("mteval", "the mill's food , 5 - star : £20.50 ."),
    ],
)
def test_tokens_of_the_published_metrics(kind, expected):
    pytest.importorskip("sacrebleu")
    assert TOKENS[kind]("The Mill's food, 5-star: £20.50.") == expected


def test_mteval_tokens_are_those_of_bleu_and_without_punctuation_those_of_captions():
    sacrebleu = pytest.importorskip("sacrebleu")
    pytest.importorskip("pycocoevalcap")
    texts = ["Blue Spice is a pub, near Clowns.", "It's cheap; no families!"]
    references = [["Blue Spice is a Pub near Clowns.", "A pub, Blue Spice."], ["it's cheap: families no.", "Cheap."]]
    streams = [list(stream) for stream in zip(*references)]
    expected = sacrebleu.BLEU(lowercase=True, tokenize="13a").corpus_score(texts, streams).score
    assert text_scores(["bleu"], texts, references, "mteval").values["bleu"] == pytest.approx(expected, abs=1e-9)
    assert _caption(texts[0]) == "blue spice is a pub near clowns"
    bare = text_scores(["rouge_l"], [texts[0]], [["blue spice is a pub near clowns"]], "mteval")
    assert bare.values["rouge_l"] == pytest.approx(100.0)
    with pytest.raises(ValueError, match="tokens: got 'bpe', expected one of spaces, words, mteval"):
        text_scores(["bleu"], texts, references, "bpe")


def test_rows_survive_an_interrupted_write(tmp_path, caplog):
    path = tmp_path / "deep" / "rows.jsonl"
    append_row(path, {"key": "a", "text": "ü\n"})
    with path.open("ab") as file:
        file.write(b'{"key": "b", "te')
    append_row(path, {"key": "c"})
    assert [row["key"] for row in read_rows(path)] == ["a", "c"]
    assert "line 2: not a whole JSON object" in caplog.text
    assert read_rows(tmp_path / "none.jsonl") == []


def _row(method, seed, scores, train_rows=None, rows=None, **more):
    return {
        "key": f"{method}{seed}", "recipe": "r", "model": "m", "data": "d", "epochs": 3, "batch": 4, "shots": None,
        "metric": "accuracy", "method": method, "seed": seed,
        "identity": {"limits": {"train_rows": train_rows, "dev_rows": None, **({"rows": rows} if rows else {})}},
        "scores": scores, "spread": {}, "metrics_missing": {}, "trained": 1234, "kept": 500, "seconds_per_step": 0.5,
        "history": {"step": [1, 2], "loss": [1.0, 0.5]}, **more,
    }  # fmt: skip


def test_a_table_and_plots_out_of_rows(tmp_path):
    spread = {"random": [80.0, 82.0, 81.0], "fixed": [79.0, 83.0]}
    history = {"step": [1, 2], "loss": [1.0, 0.5], "cross_entropy": [0.9, 0.4], "consistency": [0.1, 0.1]}
    rows = [
        _row("full", 0, {"plain": {"accuracy": 90.0}}),
        _row("full", 1, {"plain": {"accuracy": 92.0}}),
        _row("adamix", 0, {"merged": {"accuracy": 93.0}, "random": {"accuracy": 81.0}}, spread=spread, history=history),
        {**_row("prefix", 0, {}), "skipped": "no such task"},
        _row("full", 0, {"plain": {"accuracy": 50.0}}, train_rows=64),
        _row("full", 0, {"plain": {"accuracy": 60.0}}, train_rows=64, rows="drawn"),
    ]
    text = markdown(group_rows(rows))
    assert "| full | 91.00 ± 1.41 | 2 | 1,234 | 500 | 0.500 |" in text
    assert "| adamix, merged | 93.00 ± 0.00 | 1 |" in text
    assert "| adamix, random routing | 81.00 ± 0.00 | 1 |" in text
    assert "prefix: not run, no such task." in text
    assert text.count("### ") == 3
    assert "d, the first 64 training rows, all dev rows, 3 epochs" in text  # written before rows were drawn
    assert "d, 64 training rows, all dev rows, 3 epochs" in text
    written = write_summary(rows, tmp_path / "out")
    names = ["table.md", "methods-1.png", "routings-1.png", "losses-1.png", "methods-2.png", "losses-2.png"]
    names += ["methods-3.png", "losses-3.png"]
    assert [p.name for p in written] == names
    assert written[0].read_text() == text
    assert all(p.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") for p in written[1:])
    with pytest.raises(ValueError, match="no rows"):
        write_summary([], tmp_path)


def test_every_method_has_a_rate_warm_up_and_epochs_of_its_own(tmp_path):
    recipe = load_recipe("evidence/minilm")
    for text in ("pfeiffer:times_epochs=1.8", "adamix:learning_rate=0.01,times_epochs=1.8"):
        method = parse_method(text)
        assert (str(method), method.own, epochs(method, recipe)) == (text, {}, 18)
    assert learning_rate(method, recipe) == 0.01
    assert learning_rate(parse_method("full:learning_rate=0.5"), recipe) == 0.5
    assert (epochs(parse_method("full"), recipe), learning_rate(parse_method("full"), recipe)) == (10, 1e-4)
    for text, steps in (("pfeiffer", 4), ("pfeiffer:warmup_ratio=0", 0), ("adamix:warmup_ratio=0.2", 12)):
        arguments, _ = training_arguments(recipe, parse_method(text), 0, 96, tmp_path)
        assert (parse_method(text).own, arguments.warmup_steps) == ({}, steps)
    for text, message in (
        ("head:times_epochs=0", "times_epochs=0, expected a number above 0"),
        ("adamix:learning_rate=fast", "learning_rate='fast', expected a number above 0"),
        ("pfeiffer:together=0.5", "together=0.5 in 'pfeiffer:together=0.5', expected a part below 1, of drawn experts"),
        ("adamix:together=1", "together=1 in 'adamix:together=1', expected a part below 1"),
        ("adamix:together=0.5,routing=learned", "expected a part below 1, of drawn experts"),
        ("head:warmup_ratio=1", "warmup_ratio=1, expected a number from 0 to below 1"),
        ("soup:models=1", "models=1, expected a whole number of 2 or more"),
        ("pfeiffer:models=3", r"options \['models'\] for pfeiffer, expected some of \['bottleneck', 'learning_rate'"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_method(text)


def test_controls_have_the_compute_and_the_parameters_of_adamix():
    def trained(r, experts, shared):
        return r * (experts + (1 if shared else experts))

    for changes, wide in (({}, 40), ({"adamix.share": None}, 64), ({"adamix.num_experts": 8}, 72)):
        recipe = load_recipe("evidence/minilm").changed(changes)
        names = [str(method) for method in expand_methods(["controls"], recipe)]
        assert names[:3] == ["pfeiffer", "pfeiffer:times_epochs=1.8", f"pfeiffer:bottleneck={wide}"]
        assert trained(wide, 1, True) == trained(16, recipe.adamix["num_experts"], recipe.adamix["share"])
        assert names[3:] == [
            "soup", "adamix:num_experts=1", "adamix:consistency_weight=0,num_experts=2",
            "adamix:consistency_weight=0", "adamix",
        ]  # fmt: skip
    names = [str(method) for method in expand_methods(["controls"], load_recipe("nlg/lora/e2e"))]
    assert names[:3] == ["lora", "lora:times_epochs=1.8", "lora:r=18"]
    assert names[3] == "soup"


def test_differences_are_paired_by_seed(tmp_path):
    scores = {"pfeiffer": [60.0, 70.0, 80.0], "adamix": [63.0, 71.0, 82.0], "head": [50.0]}
    rows = [
        {
            "recipe": "r", "model": "m", "data": "d", "epochs": 1, "batch": 2, "shots": None, "metric": "accuracy",
            "identity": {"limits": {"train_rows": None, "dev_rows": None}}, "metrics_missing": {}, "method": method,
            "seed": seed, "scores": {"merged" if method == "adamix" else "plain": {"accuracy": value}},
        }
        for method, values in scores.items() for seed, value in enumerate(values)
    ]  # fmt: skip
    (group,) = group_rows(list(reversed(rows)))
    found = {d.line.name: d for d in differences(group, "pfeiffer")}
    ours = found["adamix, merged"]
    assert (ours.mean, ours.above, ours.seeds) == (2.0, 3, 3)
    assert (ours.low, ours.high) == pytest.approx((2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), abs=1e-3)
    assert found["head"].text == "-10.0, above in 0 of 1"
    assert "| adamix, merged | 72.00 | +2.0 (-0.5 to +4.5), above in 3 of 3 |" in differences_table(group, ["pfeiffer"])
    with pytest.raises(ValueError, match="against: got 'lora', expected one of head, adamix, pfeiffer"):
        differences(group, "lora")
    assert write_differences(rows, ["adamix"], tmp_path).read_text().startswith("### r: m on d")
    with pytest.raises(ValueError, match="against: got 'lora'"):
        write_differences(rows, ["adamix", "lora"], tmp_path)


def test_points_of_students_t():
    stats = pytest.importorskip("scipy.stats")
    for freedom in range(1, 50):
        assert t_point(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), abs=1e-3)
