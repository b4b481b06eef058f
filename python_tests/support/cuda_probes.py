"""What the tests of the C++/CUDA backend look at a call with: allocations, addresses, a captured graph."""

import contextlib

import torch
from cuda_host import DEVICE


@contextlib.contextmanager
def count_allocations():
    """Counts the tensors that the library allocates: a function to call behind the block."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        yield lambda: sum(
            event.name() == "[memory]" and event.nbytes() > 0 for event in profile.profiler.kineto_results.events()
        )


def far_apart(*tensors):
    """The same values in one memory, [3, S, C] each, samples a little more than 2**30 elements apart.

    The memory is 4 GiB, of which next to nothing is touched.
    """
    apart, room = 2**30 + 8, max(t[0].numel() for t in tensors)
    memory = torch.empty(2 * apart + len(tensors) * room, dtype=tensors[0].dtype, device=DEVICE)
    far = [memory[i * room :].as_strided(t.shape, (apart, t.stride(1), 1)) for i, t in enumerate(tensors)]
    for there, t in zip(far, tensors, strict=True):
        there.copy_(t)
    return far


def captured_graph(run):
    """(what run returned under capture, the graph): replaying it computes that anew."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    return captured, graph


def spread(t):
    """The same values, no axis contiguous."""
    return t.transpose(0, -1).contiguous().transpose(0, -1)
