# SPDX-License-Identifier: Apache-2.0
"""torch.compile makes one graph of each layer, with the values and gradients of the layer itself."""

import pytest
import torch

import rankfall as rf

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # The compiler's own.

IDS = torch.tensor([[3, 59, 3], [0, 17, 22]])
LAYERS = {
    "linear": (lambda f: rf.nn.Linear(12, 20, format=f), torch.linspace(-1, 1, 72).view(6, 12)),
    "embedding": (lambda f: rf.nn.Embedding(60, 12, padding_idx=3, format=f), IDS),
    "table": (lambda f: rf.nn.Embedding(60, 12, format=f), IDS.repeat(50, 1)),
    "bag": (lambda f: rf.nn.EmbeddingBag(60, 12, format=f), IDS),
    "padded bag": (lambda f: rf.nn.EmbeddingBag(60, 12, padding_idx=3, format=f), IDS),
    "convolution": (lambda f: rf.nn.Conv2d(4, 6, 3, format=f), torch.linspace(-1, 1, 512).view(2, 4, 8, 8)),
}


def run(layer, call, x):
    layer.zero_grad()
    torch.manual_seed(1)
    y = call(x)
    (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    return y.detach(), [p.grad for p in layer.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_one_graph(name, kind):
    make, x = LAYERS[name]
    layer = make(kind(3))
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for mode in (layer.train(), layer.eval()):
        expected, gradients = run(mode, mode, x)
        value, found = run(mode, compiled, x)
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
        for actual, reference in zip(found, gradients, strict=True):
            torch.testing.assert_close(actual, reference, rtol=1e-3, atol=1e-4)


def test_a_bag_with_offsets_is_one_graph(kind):
    layer = rf.nn.EmbeddingBag(60, 12, format=kind(3)).eval()
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    offsets = torch.tensor([0, 2, 2])
    torch.testing.assert_close(compiled(IDS[0], offsets), layer(IDS[0], offsets))


def recorder():
    """The graphs that are made, and a backend that runs them as they are."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    return graphs, backend


def test_a_cut_compiles_once_more():
    layer = rf.nn.Linear(12, 20, format=rf.TT(3), posterior=rf.Point())
    graphs, backend = recorder()
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    x = torch.ones(6, 12)
    for rank in (3, 2, 1):
        layer.weight.keep_slices_("r1", torch.arange(rank))
        for _ in range(3):
            torch.testing.assert_close(compiled(x), layer(x))
    assert len(graphs) <= 3


@pytest.mark.parametrize("name", ["linear", "embedding", "bag", "convolution"])
def test_batches_of_any_size_share_few_graphs(name, kind):
    """One for each eightfold of the batch, at most; torch gives up after eight."""
    make, x = LAYERS[name]
    layer = make(kind(3)).eval()
    graphs, backend = recorder()
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for rows in (3, 4, 5, 7, 9, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47):
        given = x[:1].repeat(rows, *[1] * (x.dim() - 1))
        torch.testing.assert_close(compiled(given), layer(given), rtol=1e-4, atol=1e-5)
    assert len(graphs) <= 5


def test_attention_is_one_graph():
    layer = rf.nn.MultiheadAttention(12, 2, format=rf.TT(3)).eval()
    x = torch.linspace(-1, 1, 72).view(6, 12)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for weights in (True, False):
        arguments = (x.view(2, 3, 12),) * 3
        found, wanted = (one(*arguments, need_weights=weights)[0] for one in (compiled, layer))
        torch.testing.assert_close(found, wanted)
