"""linear_adamix_loss with the products of a GPU, on every backend: against the loss on whole logits in double."""

import torch

from adamix_kernels.functional import adamix_loss, linear_adamix_loss
from adamix_kernels.ops.consistency import _chunks


def as_on_a_gpu(monkeypatch):
    """Both passes as a batch of two products, into rows with room between them."""
    monkeypatch.setattr(_chunks, "multiplies_apart", lambda _: True)


def check_products(backend, device, train_head, with_bias, dtype):
    """Masked rows hold NaN; the last chunk is shorter; V is odd."""
    generator = torch.Generator().manual_seed(4)
    draw = lambda *shape: torch.randn(shape, generator=generator).to(dtype).to(device)  # noqa: E731
    hidden, head = draw(6, 5, 8).requires_grad_(), draw(37, 8).requires_grad_(train_head)
    bias = draw(37).requires_grad_(train_head) if with_bias else None
    labels = torch.randint(37, (3, 5), generator=generator).to(device)
    labels[0, :2], labels[2] = -100, -100
    with torch.no_grad():
        hidden[0, 0] = hidden[5, 3] = torch.nan
    given = [hidden, head, bias] if with_bias else [hidden, head]
    leaves = [t for t in given if t.requires_grad]
    wide = [t.detach().double().requires_grad_(t.requires_grad) for t in given]
    exact = [t for t in wide if t.requires_grad]
    clean = torch.where((labels != -100).repeat(2, 1).unsqueeze(-1), wide[0], 0)
    whole = torch.nn.functional.linear(clean, *wide[1:])
    want = adamix_loss(whole, labels, detach_target=False, backend="reference")
    got = linear_adamix_loss(hidden, head, labels, bias=bias, detach_target=False, chunk_rows=4, backend=backend)
    near = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=near, atol=near)
    for one, other in zip(torch.autograd.grad(got.loss, leaves), torch.autograd.grad(want.loss, exact), strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one.double(), other, rtol=near, atol=near * other.abs().max().item())
