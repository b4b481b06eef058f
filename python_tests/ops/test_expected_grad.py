"""expected_grad of the losses: a right guess costs one visit, a wrong one a second, and neither changes a bit."""

import pytest
import torch
from tiny import tiny_bert
from tiny_training import adapted, trainer_for

from adamix_kernels import AdaMixLoss
from adamix_kernels.functional import adamix_loss, consistency_loss
from adamix_kernels.ops.consistency import _cpu, ahead, reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LABELS = torch.tensor([[0, 3, -100], [1, 1, 4]])


def source(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(2)
    return (torch.randn(shape, generator=generator) * 2).to(dtype).requires_grad_()


@pytest.fixture
def visits(monkeypatch):
    """Names of the functions that walked over the logits."""
    seen = []
    for name in ("_visit_pair", "_visit_doubled"):
        function = getattr(_cpu, name)

        def visit(*args, function=function, name=name):
            seen.append(name)
            return function(*args)

        monkeypatch.setattr(_cpu, name, visit)
    return seen


def pair(x, **options):
    return consistency_loss(x[:2], x[2:], mask=LABELS >= 0, **options)


def doubled(x, **options):
    return adamix_loss(x, LABELS, weight=0.7, label_smoothing=0.1, **options).loss


LOSSES = {"pair": pair, "doubled": doubled}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("name", LOSSES)
def test_no_bit_depends_on_the_guess(name, detach, dtype, visits):
    loss = LOSSES[name]
    for incoming in (1.0, 1 / 3, 0.1, 4096.0):
        x, wanted = source(4, 3, 5, dtype=dtype), None
        for guess in (incoming, None, 1.0, 7.0, 1 / 3):
            visits.clear()
            out = loss(x, detach_target=detach, expected_grad=guess)
            grad = torch.tensor(incoming, dtype=out.dtype)
            (got,) = torch.autograd.grad(out, x, grad, retain_graph=True)
            waits = dtype == torch.float16 and guess is None
            right = not waits and (guess or 1.0) == incoming
            assert len(visits) == (0 if waits else 1 if right else 2)
            # A retained graph gives it once more, in memory of its own.
            (again,) = torch.autograd.grad(out, x, grad)
            if waits:
                torch.testing.assert_close(got, wanted, rtol=2e-3, atol=1e-3 * incoming)
                torch.testing.assert_close(again, got, rtol=0, atol=0)
                continue
            wanted = got.clone() if wanted is None else wanted
            assert torch.equal(got, wanted)
            assert torch.equal(again, wanted)
            assert again.data_ptr() != got.data_ptr()


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("name", LOSSES)
def test_in_place_a_right_guess_is_exact_and_a_wrong_one_rounds_once_more(name, dtype, visits):
    loss, x = LOSSES[name], source(4, 3, 5, dtype=dtype)
    for incoming in (0.25, 1 / 3, 100.0):
        out = loss(x, expected_grad=incoming)
        (want,) = torch.autograd.grad(out, x, torch.tensor(incoming))
        for guess in (incoming, 3.0):
            logits, seen = x * 1, []
            logits.register_hook(seen.append)
            visits.clear()
            out = loss(logits, inplace=True, expected_grad=guess)
            (got,) = torch.autograd.grad(out, x, torch.tensor(incoming))
            assert len(visits) == 1
            near = 0.0 if guess == incoming else 4 * torch.finfo(dtype).eps
            torch.testing.assert_close(got, want, rtol=near, atol=near * want.abs().max().item() / 8)
            if name == "doubled":
                assert seen[0].data_ptr() == logits.data_ptr()


def test_float16_keeps_what_would_underflow_before_its_loss_scale():
    """A mean over very many rows, under a loss scale, expected or not."""
    x, options = source(4, 3, 5, dtype=torch.float16), dict(num_items=2**22, weight=3.0)
    wide = x.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(adamix_loss(wide, LABELS, **options).loss * 65536, wide)
    for guess in (None, 65536.0):
        (got,) = torch.autograd.grad(adamix_loss(x, LABELS, expected_grad=guess, **options).loss * 65536, x)
        assert (got.double() - exact).abs().max() <= 2**-10 * exact.abs().max()


def test_a_graph_of_the_backward_is_refused():
    x = source(4, 3, 5)
    for loss in LOSSES.values():
        (grad,) = torch.autograd.grad(loss(x, expected_grad=0.5).square(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()


def test_traced_code_takes_it_and_has_no_use_for_it():
    x, module = source(4, 3, 5), AdaMixLoss()
    torch._dynamo.reset()
    run = lambda x: module(x * 1, LABELS, expected_grad=0.5).loss + pair(x, expected_grad=0.25)  # noqa: E731
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x), x), torch.autograd.grad(run(x), x))


def test_what_intercepts_ops_gets_the_two_steps(visits):
    from torch.utils.flop_counter import FlopCounterMode

    x = source(4, 3, 5)
    (want,) = torch.autograd.grad(doubled(x), x)
    visits.clear()
    with FlopCounterMode(display=False):
        (got,) = torch.autograd.grad(doubled(x), x)
    assert visits == []
    torch.testing.assert_close(got, want)


def test_the_reference_on_a_gpu_waits_for_the_backward():
    assert ahead.writer_of("reference", None, source(2)) is reference
    for expected in (None, 1.0, 0.5):
        assert not reference.writes_gradient("cuda", torch.float32, expected)


@pytest.mark.parametrize("bad", [0, -1.0, float("inf"), float("nan"), "1", True, torch.tensor(1.0)])
def test_what_is_no_gradient_is_refused(bad):
    x = source(4, 3, 5)
    error = ValueError if type(bad) in (int, float) else TypeError
    for loss in LOSSES.values():
        with pytest.raises(error, match=r"^expected_grad: got .* expected a finite number > 0"):
            loss(x, expected_grad=bad)


@pytest.mark.parametrize("scaled", [False, True])
def test_the_trainer_says_what_comes(scaled, tmp_path, visits, monkeypatch):
    """One visit a step, under a loss scale too, which accelerate applies and which then changes."""
    model = adapted(tiny_bert())
    trainer = trainer_for(model.train(), tmp_path, gradient_accumulation_steps=2, max_steps=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if scaled else None
    monkeypatch.setattr(trainer.accelerator, "scaler", scaler)
    batch = next(iter(trainer.get_train_dataloader()))
    for step, scale in ((0, 1024.0), (1, 256.0)):
        trainer.state.global_step = step
        if scaled and step:
            scaler.update(scale)
        for _ in range(2):
            visits.clear()
            trainer.training_step(model, dict(batch), torch.tensor(7))
            assert visits == ["_visit_doubled"]
        assert trainer._expected_grad(1) == (scale if scaled else 1.0)
        assert trainer._expected_grad(4) == 4 * (scale if scaled else 1.0)
