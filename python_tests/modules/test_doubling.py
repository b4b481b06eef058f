"""double_batch and split_passes."""

from collections import namedtuple

import pytest
import torch
from transformers import BatchEncoding
from transformers.modeling_outputs import SequenceClassifierOutput

from adamix_kernels.models.doubling import double_batch, find_batch_size, split_passes


def test_every_batched_tensor_twice_and_in_order():
    ids = torch.arange(12).view(3, 4)
    doubled = double_batch({"input_ids": ids, "labels": torch.arange(3)})
    assert torch.equal(doubled["input_ids"], torch.cat([ids, ids]))
    assert doubled["labels"].tolist() == [0, 1, 2, 0, 1, 2]


def test_what_has_no_batch_axis_stays():
    inputs = {
        "input_ids": torch.zeros(2, 5, dtype=torch.long),
        "position_ids": torch.arange(5)[None],
        "temperature": torch.tensor(2.0),
        "head_mask": torch.ones(2, 4),
        "cache_position": torch.arange(2),
        "output_attentions": True,
        "name": "text",
        "nothing": None,
    }
    doubled = double_batch(inputs)
    assert doubled["input_ids"].shape == (4, 5)
    for name in set(inputs) - {"input_ids"}:
        assert doubled[name] is inputs[name]


def test_nested_containers_keep_their_types_and_the_argument_its_value():
    Pair = namedtuple("Pair", "a b")
    inputs = {
        "input_ids": torch.zeros(2, 3, dtype=torch.long),
        "encoder_outputs": (torch.ones(2, 3, 4), [torch.ones(2), "x"]),
        "extra": {"mask": torch.ones(2, 3)},
        "pair": Pair(torch.ones(2), 7),
    }
    doubled = double_batch(inputs)
    assert doubled["encoder_outputs"][0].shape == (4, 3, 4)
    assert doubled["encoder_outputs"][1][0].shape == (4,)
    assert doubled["encoder_outputs"][1][1] == "x"
    assert doubled["extra"]["mask"].shape == (4, 3)
    assert isinstance(doubled["pair"], Pair)
    assert doubled["pair"].a.shape == (4,)
    assert inputs["extra"]["mask"].shape == (2, 3)


def test_batch_encoding_stays_one():
    doubled = double_batch(BatchEncoding({"input_ids": torch.zeros(3, 2, dtype=torch.long)}))
    assert isinstance(doubled, BatchEncoding)
    assert doubled["input_ids"].shape == (6, 2)


@pytest.mark.parametrize("batch", [0, 1, 7])
def test_split_undoes_double(batch):
    x = torch.randn(batch, 3, generator=torch.Generator().manual_seed(0))
    first, second = split_passes(double_batch(x), batch)
    assert torch.equal(first, x)
    assert torch.equal(second, x)


def test_split_keeps_a_model_output_and_shares_the_rest():
    scalar = torch.tensor(1.0)
    outputs = SequenceClassifierOutput(
        loss=scalar, logits=torch.arange(8.0).view(4, 2), hidden_states=(torch.ones(4, 3),)
    )
    first, second = split_passes(outputs, 2)
    assert isinstance(first, SequenceClassifierOutput)
    assert first.loss is scalar
    assert first.logits.tolist() == [[0, 1], [2, 3]]
    assert second.logits.tolist() == [[4, 5], [6, 7]]
    assert first.hidden_states[0].shape == (2, 3)


def test_gradients_of_both_passes_reach_the_input():
    x = torch.ones(2, 3, requires_grad=True)
    first, second = split_passes(double_batch(x), 2)
    (first.sum() + 2 * second.sum()).backward()
    assert torch.equal(x.grad, torch.full_like(x, 3))


def test_batch_size_prefers_the_input_ids():
    assert find_batch_size({"head_mask": torch.ones(6, 4), "extra": torch.ones(9), "input_ids": torch.ones(2, 3)}) == 2


def test_no_tensor_is_an_error():
    with pytest.raises(ValueError, match=r"inputs: got dict without a tensor"):
        double_batch({"text": ["a", "b"], "scale": torch.tensor(1.0)})
