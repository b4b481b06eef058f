"""Who asks for a verification: verify() on made-up GPUs, adapt(), a trainer, the command line, env, backends()."""

import contextlib
import json
import warnings
from types import SimpleNamespace

import pytest
import torch
from verify_cases import ADAPTER, apart, no_child, right, store
from verify_stand_ins import PLAIN

import adamix_kernels
from adamix_kernels import _auto, _backends, cli, verifying
from adamix_kernels.commands import env
from adamix_kernels.commands import verify as command
from adamix_kernels.models import proving
from adamix_kernels.verifying import checks, guards, prover, table, verdicts
from adamix_kernels.verifying.machine import Job, Machine

__all__ = ["apart", "no_child", "store"]


@pytest.fixture
def gpus(monkeypatch):
    """Two H100 and an A100, on which every kernel can run, and which a made-up process verifies: right, but for one."""
    names = ["NVIDIA H100", "NVIDIA H100", "NVIDIA A100"]
    facts = [SimpleNamespace(name=n, major=9 - ("A100" in n), minor=0, multi_processor_count=132) for n in names]
    for name in facts:
        name.total_memory = 80 << 30
    proved = []

    def prove(jobs, machine, store, *rest):
        proved.append((machine.device, len(jobs)))
        bad = Job("merge", "triton", "float32", "any")
        made = {job: verdicts.verdict(job, machine, "right" if job != bad else "wrong", "one row: off") for job in jobs}
        for verdict in made.values():
            store.write(verdict, machine)
        return made

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(facts))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts[torch.device("cuda", device).index
                        if isinstance(device, int) else device.index])  # fmt: skip
    monkeypatch.setattr(_backends, "_problem", lambda op, backend, device, dtype: None)
    monkeypatch.setattr(_backends, "_environment_problem", lambda backend: None)
    monkeypatch.setattr(_backends, "_state", lambda backend: (True, "ready"))
    monkeypatch.setattr(prover, "prove", prove)
    return proved


def auto(op, number, dtype=torch.float32, size=0):
    return _auto.table.backend(op, torch.device("cuda", number), dtype, size)


def test_each_kind_of_gpu_is_verified_once_and_all_alike_take_the_result(gpus):
    with pytest.warns(RuntimeWarning, match=r"are not used by \"auto\": merge triton float32 any is wrong \(one row"):
        report = adamix_kernels.verify()
    assert gpus == [("cuda:0", 84), ("cuda:2", 84)]
    assert len(report.of("right")) == 166
    # By the table triton on an H100, were it right; the second choice.
    assert table.preferred(90, "merge", "float32", "any").order[:2] == ("triton", "cuda")
    assert [auto("merge", n) for n in range(3)] == ["cuda"] * 3
    first = table.preferred(90, "consistency", "bfloat16", "many").order[0]
    assert auto("consistency", 1, torch.bfloat16, 50257) == first != "reference"
    assert auto("consistency", 1, torch.float64, 50257) == "reference"


def test_a_model_asks_for_what_the_table_would_take_and_once(gpus):
    device = torch.device("cuda")
    needs = [("routed_lora", torch.bfloat16, 64), ("consistency", torch.bfloat16, 3), ("merge", torch.float64, 0)]
    report = verifying.verify_for(device, needs)
    wanted = [("routed_lora", "bfloat16", "narrow"), ("consistency", "bfloat16", "few")]
    assert {tuple(v.job) for v in report.verdicts} == {
        (op, table.preferred(90, op, dtype, shape).order[0], dtype, shape) for op, dtype, shape in wanted
    }
    assert verifying.verify_for(device, needs) is None
    assert len(gpus) == 1
    assert auto("routed_lora", 1, torch.bfloat16, 64) != "reference"
    assert auto("routed_lora", 2, torch.bfloat16, 64) == "reference"  # the other kind


def test_the_second_choice_is_verified_where_the_first_is_not_right(gpus):
    with pytest.warns(RuntimeWarning, match="merge triton float32 any is wrong"):
        report = verifying.verify_for(torch.device("cuda", 0), [("merge", torch.float32, 0)])
    assert [(v.backend, v.state) for v in report.verdicts] == [("triton", "wrong"), ("cuda", "right")]
    assert auto("merge", 1) == "cuda"


def test_a_model_is_never_stopped_by_it(gpus, monkeypatch):
    def fails(*given, **options):
        raise OSError("no process can be started")

    monkeypatch.setattr(prover, "prove", fails)
    with pytest.warns(RuntimeWarning, match='"auto" stays the reference: OSError: no process can be started'):
        assert verifying.verify_for(torch.device("cuda", 0), [("merge", torch.float32, 0)]) is None


def tiny(**options):
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    return adamix_kernels.adapt(model, adamix_kernels.AdaMixConfig(target_modules=["0"], **options))


def test_adapt_asks_for_what_its_layers_and_its_loss_need(monkeypatch):
    asked = []
    monkeypatch.setattr(proving, "verify_for", lambda device, needs: asked.append((device, list(needs))))
    tiny(bottleneck=2)
    assert asked == [(torch.device("cpu"), [("merge", torch.float32, 0), ("routed_adapter", torch.float32, 8)])]
    asked.clear()
    model = tiny(method="lora", r=4, share=None)
    model.config = SimpleNamespace(num_labels=3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        proving.settle_backends(model, [torch.float16])
    assert {need[:1] + need[2:] for need in asked[-1][1]} == {("merge", 0), ("routed_lora", 16), ("consistency", 3)}
    assert {need[1] for need in asked[-1][1]} == {torch.float32, torch.float16, torch.bfloat16}
    asked.clear()
    tiny(method="lora", r=4, share="down", routing="learned")
    wanted = [("merge", torch.float32, 0), ("routed_lora", torch.float32, 4), ("gated_lora", torch.float32, 16)]
    assert asked == [
        (torch.device("cpu"), [*wanted, ("router", torch.float32, 0), ("mixture_lora", torch.float32, 16)])
    ]
    asked.clear()
    adamix_kernels.adapt(torch.nn.Sequential(torch.nn.Linear(8, 8)),
                         adamix_kernels.AdaMixConfig(target_modules=["0"]), backend="reference")  # fmt: skip
    assert asked == []


def test_on_a_cpu_nothing_happens(no_child, store):
    tiny(bottleneck=2)
    assert not store.folder.exists()


def test_env_and_backends_say_right_wrong_and_unknown_since_when_and_why(gpus, store, capsys, monkeypatch):
    machine = Machine.of(0)
    store.write(verdicts.verdict(ADAPTER, machine, "right"), machine)
    store.write(verdicts.verdict(ADAPTER._replace(shape="wide"), machine, "crashed", "tokens: was ended by X"), machine)
    state = adamix_kernels.backends()["triton"]
    assert sorted({v.state for v in state.verdicts}) == ["crashed", "right", "unknown"]
    assert len(state.verdicts) == 84
    text = env.in_words(env.describe())
    assert "  NVIDIA H100: 1 kernels right since 20" in text
    assert "    routed_adapter float32 wide: tokens: was ended by X (20" in text
    assert "  NVIDIA A100: 42 kernels unknown: adamix verify" in text
    assert json.dumps(env.describe())


def test_the_command_without_a_gpu_says_so(capsys, tmp_path):
    assert cli.main(["verify", "--export", str(tmp_path / "out.json")]) == 3
    printed = capsys.readouterr().out
    assert printed.startswith("Nothing was verified: torch sees no GPU.")
    assert "triton: Triton compiles for GPUs" in printed or "triton: ready" in printed
    written = json.loads((tmp_path / "out.json").read_text())
    assert (written["format"], written["problem"], written["verdicts"]) == (1, "torch sees no GPU", [])
    assert cli.main(["verify", "--export", str(tmp_path / "no" / "x.json")]) == 2
    wrong = capsys.readouterr()
    assert (wrong.out, wrong.err.endswith("no': no such folder\n")) == ("", True)
    assert str(tmp_path) not in json.dumps(written).replace("out.json", "")


def test_the_command_prints_a_table_and_its_status(gpus, capsys, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert cli.main(["verify", "--ops", "merge", "--dtypes", "float32", "--export", str(tmp_path / "x.json")]) == 1
        lines = capsys.readouterr().out.splitlines()
        assert "merge  any     float32  wrong   right  cuda" in lines
        assert "merge triton float32 any: wrong: one row: off" in lines
        assert cli.main(["verify", "--ops", "merge", "--dtypes", "float16"]) == 0
    written = json.loads((tmp_path / "x.json").read_text())
    assert written["auto"][0] == ["NVIDIA H100", "merge", "float32", "any", "cuda"]
    assert cli.main(["verify", "--seconds", "0"]) == 2


def test_what_ran_out_of_time_is_no_success(monkeypatch):
    late = verdicts.unknown(ADAPTER, PLAIN, "time ran out before it")
    assert command.status(verifying.Report((right(), late), {})) == 3
    assert command.status(verifying.Report((right(),), {})) == 0
    assert command.status(verifying.Report((), {})) == 3


@pytest.mark.parametrize("where", [-1, 6])
def test_guard_bands_see_one_number_on_either_side(where):
    with guards.Guards("cpu") as bands:
        t = torch.empty(2, 3)
        assert t.isnan().all()
        whole = torch.as_strided(t, (8,), (1,), t.storage_offset() - 1)
        whole[1:7] = 1.0
    assert bands.broken() is None
    whole[where + 1] = 0.0
    assert "of a tensor float32[2, 3]" in bands.broken()
    assert not torch.empty(2, 3).untyped_storage().nbytes() > 24  # the usual memory again


def test_guards_are_around_what_kernels_allocate():
    with guards.Guards("cpu"):
        base = torch.ones(3)
        for t in (base, base.new_empty(2), torch.empty(2), torch.zeros(2), base.new_zeros(1), torch.empty_like(base)):
            assert t.storage_offset() * t.itemsize == guards.BAND
        assert torch.empty(0, 3).numel() == 0
        turned = torch.empty(3, 2).t()
        assert torch.empty_like(turned, dtype=torch.float16).stride() == turned.stride()


def test_a_trainer_asks_before_it_trains_for_what_its_autocast_computes_in(monkeypatch, tmp_path):
    pytest.importorskip("transformers")
    from tiny import tiny_bert
    from tiny_training import adapted, trainer_for

    from adamix_kernels.models import trainer

    class Stop(Exception):
        pass

    def stop(model, dtypes):
        raise Stop(list(dtypes))

    monkeypatch.setattr(trainer, "settle_backends", stop)
    with pytest.raises(Stop) as stopped:
        trainer_for(adapted(tiny_bert()), tmp_path, bf16=True).train()
    assert stopped.value.args == ([torch.bfloat16],)


@pytest.mark.parametrize("captured", [True, False])
def test_what_a_graph_does_not_write_again_shows(monkeypatch, captured):
    """With a made-up graph: its replay writes what the capture wrote, or nothing."""
    grad, made = torch.ones(3), torch.arange(3.0)
    graph = SimpleNamespace(replay=lambda: made.copy_(torch.arange(3.0)) if captured else None)
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda: stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda which: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    results = checks.replay(lambda: [made, grad], [grad])
    assert results[0].tolist() == ([0, 1, 2] if captured else [0, 0, 0])
    assert results[1].tolist() == [1, 1, 1]  # an input, handed through
