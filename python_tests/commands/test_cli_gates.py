"""Presets and tasks on the command line: what they configure, and a small run from train to merge."""

import json
import random

import pytest
import tiny_recipes
import tiny_text

from adamix_kernels import AdaMixConfig, cli, tasks
from adamix_kernels.commands import train

MERGED = "merged"
WORDS = ("the", "film", "meal", "was", "a", "story", "very", "not")


def config(*flags, names=2):
    return train.parse(flags).config(names)


@pytest.mark.parametrize("name", ["hydra_lora", "lora_moe", "mola", "smear"])
def test_a_preset_is_that_of_python(name):
    assert config("--preset", name) == getattr(AdaMixConfig, name)(target_modules=None)


def test_what_is_given_beside_a_preset_counts():
    assert config("--preset", "mola", "--lora_r", "4", "--lora_alpha", "8") == AdaMixConfig.mola(r=4, alpha=8.0)
    assert config("--preset", "mola", "--num_experts", "4") == AdaMixConfig.mola(num_experts=4, experts_pattern=None)
    assert config("--preset", "hydra_lora", "--lora_dropout", "0.1") == AdaMixConfig.hydra_lora(dropout=0.1)
    by_task = config("--task_column", "domain", names=5)
    assert (by_task.routing, by_task.router, by_task.num_tasks, by_task.mix) == ("learned", "task", 5, "weights")
    assert config("--task_column", "domain", "--mix", "outputs").mix == "outputs"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--preset", "mole"], "preset: got 'mole', expected one of 'none', 'hydra_lora'"),
        (["--preset", "mola", "--routing", "batch"], "preset: got mola with --routing batch|router|top_k"),
        (["--router", "task", "--routing", "learned"], "router: got task, expected --task_column too"),
        (["--router", "linear"], "router: got linear with --routing batch, expected --routing learned"),
        (
            ["--task_column", "a", "--router", "linear"],
            "task_column: got 'a' with --router linear, expected --router task",
        ),
        (["--task_column", "a", "--routing", "token"], "--routing token, expected --routing learned"),
        (["--task_column", "a", "--preset", "mola"], "top_k: got 2 for router='task'"),
    ],
)
def test_what_excludes_each_other_is_named(flags, words):
    with pytest.raises(ValueError, match=words):
        config(*flags)


@pytest.fixture(scope="module")
def domains(tmp_path_factory):
    """A run whose label is the opposite in one domain."""
    folder, draw = tmp_path_factory.mktemp("domains"), random.Random(0)
    tiny_text.write_encoder(folder / "encoder")
    lines = ["domain,text,label"]
    for i in range(48):
        domain, good = ("shop", "cinema")[i // 2 % 2], i % 2 == 0
        label = "pos" if good == (domain == "shop") else "neg"
        lines.append(f"{domain},{' '.join([('bad', 'good')[good], *draw.choices(WORDS, k=4)])},{label}")
    (folder / "own.csv").write_text("\n".join(lines) + "\n")
    flags = ["--model", str(folder / "encoder"), "--data", str(folder / "own.csv"), "--out", str(folder / "out")]
    more = [
        "--max_steps",
        "6",
        "--learning_rate",
        "2e-2",
        "--use_cpu",
        "--disable_tqdm",
        "--no_baselines",
        "--task_column",
        "domain",
    ]
    assert cli.main(["train", *flags, *more]) == 0
    return folder


def test_the_report_has_every_mean_gate_and_the_card_says_what_it_is(domains):
    report, card = (domains / "out" / name for name in ("adamix_report.json", "README.md"))
    gates = json.loads(report.read_text())["mean_gates"]
    assert [len(row) for row in gates.values()] == [4] * 2
    assert all(abs(sum(row) - 1) < 1e-3 for row in gates.values())
    assert "experts are weighed by learned gates (router: task)." in card.read_text()


def test_a_run_knows_its_tasks(domains, capsys):
    run = tasks.read_run(domains / "out")
    assert (run.task_column, run.task_names, run.text_column) == ("domain", ["cinema", "shop"], "text")
    assert cli.main(["eval", str(domains / "out"), "--disable_tqdm"]) == 0
    assert "(learned)" in capsys.readouterr().out


def test_predictions_go_by_the_task(domains, capsys):
    flags = ["predict", "--run", str(domains / "out"), "--json"]
    answers = []
    for name in run_names(domains):
        assert cli.main([*flags, "--task_name", name, "good film"]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] != answers[1]
    (domains / "in.csv").write_text("domain,text\nshop,good film\ncinema,good film\n")
    assert cli.main([*flags, "--file", str(domains / "in.csv"), "--disable_tqdm"]) == 0
    assert set(capsys.readouterr().out.splitlines()) == {line.strip() for line in answers}
    (domains / "in.csv").write_text("domain,text\nbank,good film\n")
    for more, words in (
        (["good film"], "task_name: got nothing, expected one of the training's tasks, 'cinema', 'shop'"),
        (["--task_name", "bank", "good film"], "task_name: got the task 'bank', expected one of the training's"),
        (["--file", str(domains / "in.csv")], "in.csv, line 2: got the task 'bank'"),
        (["--file", str(domains / "in.csv"), "--task_column", "none"], "task_column: got 'none', but"),
    ):
        assert cli.main([*flags, *more]) != 0
        assert words in capsys.readouterr().err


def test_a_merged_run_needs_no_task(domains, capsys):
    out = str(domains / MERGED)
    assert cli.main(["merge", str(domains / "out"), "--out", out]) != 0
    assert "--gates mean" in capsys.readouterr().err
    assert cli.main(["merge", str(domains / "out"), "--gates", "mean", "--out", out]) == 0
    assert "the mean gates do not say" in capsys.readouterr().out
    assert cli.main(["predict", "--run", out, "good film"]) == 0
    assert cli.main(["eval", out, "--disable_tqdm"]) == 0


def test_an_export_names_the_command_that_merges(domains, capsys):
    run = str(domains / "out")
    assert cli.main(["export", run, "--out", str(domains / "exported")]) == 2
    assert f"expected a merged one: adamix merge {run} --gates mean --out FOLDER" in capsys.readouterr().err
    assert not (domains / "exported").exists()


@pytest.mark.parametrize("option", ["task_name", "task_column"])
def test_a_pack_has_no_tasks(option, capsys):
    assert cli.main(["predict", "--pack", "none", "--adapter", "a", f"--{option}", "shop", "good film"]) == 2
    assert f"{option}: got 'shop' with --pack, expected none: a pack has no gates" in capsys.readouterr().err


def test_gates_of_a_text_are_refused_before_anything_is_measured(tmp_path, capsys):
    tiny_recipes.write_causal(tmp_path / "gpt")
    lines = [json.dumps({"prompt": f"{a} {b}", "completion": f"{b} {a}"}) for a in WORDS for b in WORDS]
    (tmp_path / "own.jsonl").write_text("\n".join(lines) + "\n")
    flags = ["--data", str(tmp_path / "own.jsonl"), "--text_column", "prompt", "--label_column", "completion"]
    flags += ["--task", "generation", "--model", str(tmp_path / "gpt"), "--out", str(tmp_path / "out"), "--use_cpu"]
    assert cli.main(["train", *flags, "--preset", "smear"]) == 2
    said = capsys.readouterr()
    assert "router: got 'sentence' for GPT2LMHeadModel (a model that generates)" in said.err
    assert "training on" not in said.out
    assert cli.main(["train", *flags, "--target_modules", "c_atn"]) == 2
    said = capsys.readouterr()
    assert "target_modules: got ['c_atn']" in said.err
    assert "closest: attn.c_attn" in said.err or "closest: c_attn" in said.err
    assert "training on" not in said.out


@pytest.mark.parametrize("name", ["hydra_lora", "lora_moe"])
def test_generation_from_training_to_an_export(name, tmp_path, capsys):
    run, merged, exported = (str(tmp_path / folder) for folder in ("run", MERGED, "exported"))
    tiny_recipes.write_causal(tmp_path / "gpt")
    words = tiny_recipes.WORDS[:6]
    lines = [json.dumps({"prompt": f"{a} {b}", "completion": "the the the the"}) for a in words for b in words]
    (tmp_path / "own.jsonl").write_text("\n".join(lines) + "\n")
    flags = ["--data", str(tmp_path / "own.jsonl"), "--text_column", "prompt", "--label_column", "completion"]
    flags += ["--task", "generation", "--model", str(tmp_path / "gpt"), "--max_tokens", "16", "--max_new_tokens", "4"]
    flags += ["--max_steps", "12", "--learning_rate", "5e-2", "--no_baselines", "--use_cpu", "--disable_tqdm"]
    flags += ["--z_weight", "0.01", "--metrics", "bleu", "--beams", "1", "--target_modules", "all-linear"]
    assert cli.main(["train", *flags, "--preset", name, "--out", run]) == 0
    said = capsys.readouterr().out
    assert "z loss" in said
    assert ("balance loss" in said) == (name == "lora_moe")
    gates = json.loads((tmp_path / "run" / "adamix_report.json").read_text())["mean_gates"]
    experts = {"hydra_lora": 3, "lora_moe": 8}[name]
    assert all(len(row) == experts and abs(sum(row) - 1) < 1e-3 for row in gates.values())
    losses = []
    for folder, how in ((run, "learned"), (merged, MERGED)):
        assert cli.main(["eval", folder, "--metrics", "bleu", "--disable_tqdm", "--json"]) == 0
        scores = json.loads(capsys.readouterr().out)
        assert scores["routing"] == how
        losses.append(scores["loss"])
        assert cli.main(["predict", "--run", folder, "--json", "name area"]) == 0
        assert json.loads(capsys.readouterr().out)["generated"] == "the the the the"
        if how == MERGED:
            break
        assert cli.main(["merge", run, "--out", merged]) == 2
        assert "--gates mean" in capsys.readouterr().err
        assert cli.main(["merge", run, "--gates", "mean", "--out", merged]) == 0
        assert "the mean gates do not say" in capsys.readouterr().out
    assert losses[0] != losses[1]
    assert cli.main(["export", run, "--out", exported]) == 2
    assert cli.main(["export", merged, "--out", exported]) == 0
    assert (tmp_path / "exported" / "adapter_config.json").is_file()


def run_names(folder):
    return tasks.read_run(folder / "out").task_names


def test_a_column_of_one_task_is_refused(tmp_path):
    (tmp_path / "one.csv").write_text("domain,text,label\na,x,0\na,y,1\n")
    with pytest.raises(ValueError, match=r"task_column: got 'domain' of .* with 1 different names"):
        tasks.load_task(str(tmp_path / "one.csv"), task_column="domain")
    (tmp_path / "one.csv").write_text("domain,text,label\na,x,0\n,y,1\n")
    with pytest.raises(ValueError, match="line 3, column 'domain': got '', expected the name of a task"):
        tasks.load_task(str(tmp_path / "one.csv"), task_column="domain")
