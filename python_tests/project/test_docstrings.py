"""The examples in the docstrings of the public names run as they are printed."""

import copy
import doctest
import inspect

import pytest
import torch

import adamix_kernels

NAMES = sorted(set(adamix_kernels.__all__) - {"__version__"})


@pytest.fixture
def namespace(tmp_path, monkeypatch):
    """What an example may use, as docs/reference.md says."""
    pytest.importorskip("transformers")
    from tiny import tiny_bert

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = tiny_bert()
    batch = {"input_ids": torch.randint(3, 50, (2, 6)), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    names = {"torch": torch, "model": model, "batch": batch, **{name: getattr(adamix_kernels, name) for name in NAMES}}
    for number, folder in enumerate(("leases", "patents")):
        torch.manual_seed(number)
        trained = adamix_kernels.adapt(copy.deepcopy(model), adamix_kernels.AdaMixConfig(bottleneck=4))
        names[folder] = adamix_kernels.save_adamix(trained, tmp_path / folder)
    return names


@pytest.mark.parametrize("name", NAMES)
def test_the_example(name, namespace):
    text = inspect.getdoc(getattr(adamix_kernels, name))
    example = doctest.DocTestParser().get_doctest(text, namespace, name, None, None)
    assert example.examples, f"{name}: its docstring has no example"
    said = []
    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example, out=said.append)
    assert result.failed == 0, "".join(said)
