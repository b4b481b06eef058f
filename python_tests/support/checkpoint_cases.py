"""Tiny adapted models whose every value is random, what two of them have in common, and ways to edit a checkpoint."""

import json

import tiny
import torch

from adamix_kernels.models import _files, checkpoint
from adamix_kernels.models._files import sealed
from adamix_kernels.models.config import AdaMixConfig
from adamix_kernels.models.inject import adapt

CASES = {
    "bert_adapter": (tiny.tiny_bert, dict(method="adapter", bottleneck=5, num_experts=3)),
    "bert_lora": (tiny.tiny_bert, dict(method="lora", r=2, num_experts=3, share=None)),
    "gpt2_adapter": (tiny.tiny_gpt2, dict(method="adapter", bottleneck=3, share="down")),
    "gpt2_lora": (tiny.tiny_gpt2, dict(method="lora", r=2, modules_to_save=["ln_f"])),
    "llama_lora": (tiny.tiny_llama, dict(method="lora", r=2)),
}


def adapted(case="bert_adapter", seed=3, dtype=torch.float32, **more):
    """A tiny model with every bank, score and head random."""
    make, options = CASES[case]
    model = adapt(make().to(dtype), AdaMixConfig(**{**options, **more}))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or name.endswith("_score"):
                parameter.copy_(torch.randn_like(parameter))
    return model


def bare(case="bert_adapter", dtype=torch.float32):
    return CASES[case][0]().to(dtype)


def picture(model):
    """Everything a failed load must leave alone."""
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        {name: type(module) for name, module in model.named_modules()},
        {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        getattr(model, "adamix", None),
        model.training,
    )


def same_picture(a, b):
    assert a[0].keys() == b[0].keys()
    assert all(torch.equal(a[0][k], b[0][k]) for k in a[0])
    assert a[1:] == b[1:]


def same_bits(a, b):
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert value.dtype == second[key].dtype, key
        assert torch.equal(value, second[key]), key
    flags = [{n: p.requires_grad for n, p in m.named_parameters()} for m in (a, b)]
    assert flags[0] == flags[1]


def edit_sealed(path, change):
    """change(values) of a sealed JSON file, which is then wrong in itself, not damaged: its digest is right."""
    values = json.loads(path.read_text())
    del values["sha256"]
    change(values)
    path.write_text(json.dumps(sealed(values)))


def edit_header(folder, **changes):
    edit_sealed(folder / checkpoint.CHECKPOINT_NAME, lambda header: header.update(changes))


def edit_text(folder, old, new):
    path = folder / checkpoint.CHECKPOINT_NAME
    path.write_text(path.read_text().replace(old, new))


def tensor_file(folder):
    (found,) = folder.glob("adamix-*.safetensors")
    return found


def rewrite_tensors(folder, change):
    """Changes the tensors and the header that vouches for them."""
    from safetensors.torch import load_file, save_file

    path = tensor_file(folder)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    edit_header(folder, tensors={"file": path.name, "bytes": path.stat().st_size, "sha256": _files.sha256(path)})


def truncate(folder):
    path = tensor_file(folder)
    path.write_bytes(path.read_bytes()[:-8])


def flip(folder):
    path = tensor_file(folder)
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
