# SPDX-License-Identifier: Apache-2.0
"""Which batches share a CUDA graph, and when it is made; test_gpu.py has what needs a GPU."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from rankfall import _graphs
from rankfall._graphs import Replayed, _kind, _tensors


def test_batches_of_one_shape_share_a_graph():
    one = {"x": torch.zeros(3, 4), "others": [torch.zeros(2), "words", 5]}
    other = {"x": torch.ones(3, 4), "others": [torch.ones(2), "words", 5]}
    assert _kind(one) == _kind(other)
    assert len({_kind(one), _kind(other)}) == 1
    assert [t.shape for t in _tensors(one)] == [(3, 4), (2,)]
    for changed in (
        {"x": torch.ones(2, 4), "others": [torch.ones(2), "words", 5]},
        {"x": torch.ones(3, 4).long(), "others": [torch.ones(2), "words", 5]},
        {"x": torch.ones(3, 4), "others": [torch.ones(2), "words", 6]},
        {"y": torch.ones(3, 4), "others": [torch.ones(2), "words", 5]},
    ):
        assert _kind(one) != _kind(changed)


def test_what_cannot_be_compared_is_never_the_same():
    assert _kind([{1}]) != _kind([{1}])


class FakeGraph:
    """Counts what it is asked for, and computes nothing."""

    def __init__(self):
        self.replays = 0

    def replay(self):
        self.replays += 1


@pytest.fixture
def fake_gpu(monkeypatch):
    graphs = []

    def graph():
        graphs.append(FakeGraph())
        return graphs[-1]

    stream = SimpleNamespace(wait_stream=lambda _: None)
    for name, value in {
        "Stream": lambda _: stream,
        "current_stream": lambda _: stream,
        "stream": lambda _: nullcontext(),
        "graph_pool_handle": lambda: None,
        "CUDAGraph": graph,
        "graph": lambda *_, **__: nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return graphs


def test_a_shape_is_captured_after_some_passes_by_hand(fake_gpu):
    weight, seen = nn.Parameter(torch.ones(3)), []

    def run(batch):
        seen.append(batch[0])
        weight.grad = None
        (weight * batch[0]).sum().backward()
        return (batch[0].sum(),)

    passes = Replayed(run, [weight], torch.device("cpu"))
    for k in range(6):
        passes([torch.full((3,), float(k))])
    assert len(seen) == 3 + 1  # The last one is kept as the graph's input, which later batches are written to.
    assert torch.equal(seen[-1], torch.full((3,), 5.0))
    assert [graph.replays for graph in fake_gpu] == [3]
    captured = weight.grad
    passes([torch.ones(1)])
    assert weight.grad is not captured
    passes([torch.ones(3)])
    assert weight.grad is captured
    assert len(seen) == 5


def test_only_so_many_shapes_are_captured(fake_gpu, monkeypatch):
    monkeypatch.setattr(_graphs, "_MOST", 2)
    passes = Replayed(lambda batch: (batch,), [], torch.device("cpu"))
    for size in (1, 2, 3):
        for _ in range(5):
            passes(torch.ones(size))
    assert [graph.replays for graph in fake_gpu] == [2, 2]
