# SPDX-License-Identifier: Apache-2.0
"""A GPU computes what a CPU does, is never waited for within a step, and repeats a step as a CUDA graph."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rankfall as rf
from rankfall._elbo import JointDraw
from small_layers import LAYERS

# The compiler's own.
of_compiler = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
pytestmark = pytest.mark.filterwarnings("ignore:cuDNN's:RuntimeWarning")  # Of GPUs on which it is wrong.
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Net(nn.Module):
    """Every kind of layer in one: a few words and a small picture to one of ten classes."""

    def __init__(self, posterior: rf.Point | rf.MeanField, device: str) -> None:
        super().__init__()
        kept = {"posterior": posterior, "device": device}
        self.words = rf.nn.Embedding(5000, 16, format=rf.TTM(4, out_modes=(17, 18, 17), in_modes=(2, 2, 4)), **kept)
        self.bags = rf.nn.EmbeddingBag(300, 16, format=rf.TT(4), **kept)
        self.pixels = rf.nn.Conv2d(1, 8, 3, format=rf.CP(4), **kept)
        self.head = rf.nn.Linear(16 + 16 + 8, 10, format=rf.TTM(4), **kept)

    def forward(self, words: torch.Tensor, picture: torch.Tensor) -> torch.Tensor:
        seen = self.pixels(picture).relu().mean((2, 3))
        return self.head(torch.cat([self.words(words).mean(1), self.bags(words % 300), seen], 1))


def batch(count: int = 32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randint(5000, (count, 7)), torch.randn(count, 1, 8, 8), torch.randint(10, (count,))


def step_of(model: nn.Module, optimizer: torch.optim.Optimizer, given: tuple[torch.Tensor, ...]):
    joint, (*inputs, labels) = JointDraw(model), given

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        with joint() as kl:
            loss = F.cross_entropy(model(*inputs), labels) + kl / 1000
        loss.backward()
        joint.hand_on_()
        optimizer.step()
        return loss.detach()

    return step


@contextmanager
def without_waiting() -> Iterator[None]:
    try:
        torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def first(y):
    return y[0] if isinstance(y, tuple) else y


class Reader(nn.Module):
    """A table of words that is read by one of its halves, and two recurrent layers in both directions."""

    def __init__(self) -> None:
        super().__init__()
        self.words = rf.nn.Embedding(
            25_000,
            256,
            padding_idx=0,
            format=rf.TT(8, out_modes=(25_000, 1), in_modes=(1, 256)),
            posterior=rf.Point(),
        )
        self.lstm = rf.nn.LSTM(
            256, 32, num_layers=2, bidirectional=True, batch_first=True, format=rf.TT(4), posterior=rf.Point()
        )
        self.head = rf.nn.Linear(64, 2, format=rf.TT(2), posterior=rf.Point())

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(self.words(ids))[0].mean(1))


def texts(count: int = 12) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of three lengths in turn, words as frequent as they are in texts, filled up with padding."""
    found = []
    for k in range(count):
        ids = (25_000 ** torch.rand(64, (128, 40, 7)[k % 3])).long().clamp(max=24_999)
        ids[:8, -2:] = 0
        found.append((ids, torch.randint(2, (64,))))
    return found


def gradients(layer: nn.Module, inputs: tuple[torch.Tensor, ...]):
    y = first(layer(*inputs))
    (y * torch.linspace(0.1, 1, y.numel(), dtype=y.dtype, device=y.device).view(y.shape)).sum().backward()
    return [y, *(p.grad for p in layer.parameters() if p.grad is not None)]


@on_gpu
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_computes_what_it_does_on_a_cpu(name, kind):
    make, inputs = LAYERS[name]
    layer, twin = make(kind(3)).double(), make(kind(3)).double()
    twin.load_state_dict(layer.state_dict())
    twin.cuda()
    inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    wanted = gradients(layer, inputs)
    found = gradients(twin, tuple(x.cuda() for x in inputs))
    assert len(found) == len(wanted) > 1
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-9, atol=1e-10)


@on_gpu
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_in_bfloat16_adds_up_in_float32(name, kind):
    make, inputs = LAYERS[name]
    layer, inputs = make(kind(3)).cuda(), tuple(x.cuda() for x in inputs)
    wanted = gradients(layer, inputs)
    layer.zero_grad()
    with torch.autocast("cuda", torch.bfloat16):
        found = gradients(layer, inputs)
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).norm() <= 0.15 * other.norm() + 1e-6


@on_gpu
@of_compiler
@pytest.mark.parametrize("name", [name for name in LAYERS if name not in ("LSTM", "GRU")])
def test_a_layer_compiles_to_one_graph(name, kind):
    make, inputs = LAYERS[name]
    layer, inputs = make(kind(3)).cuda(), tuple(x.cuda() for x in inputs)
    torch.compiler.reset()
    wanted = first(layer(*inputs))
    found = first(torch.compile(layer, fullgraph=True, backend="aot_eager")(*inputs))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@on_gpu
@of_compiler
@pytest.mark.parametrize("name", ["linear", "embedding", "bag"])
def test_inductor_compiles_for_a_gpu(name):
    make, inputs = LAYERS[name]
    layer, inputs = make(rf.TTM(3)).cuda(), tuple(x.cuda() for x in inputs)
    torch.compiler.reset()
    wanted = gradients(layer, inputs)
    layer.zero_grad()
    found = gradients(torch.compile(layer, fullgraph=True), inputs)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@on_gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("posterior", [rf.Point(), rf.MeanField()], ids=["point", "mean-field"])
def test_no_step_waits_for_the_gpu(posterior):
    model = Net(posterior, "cuda").train()
    step = step_of(model, torch.optim.Adam(model.parameters(), fused=True), tuple(x.cuda() for x in batch()))
    step()
    with without_waiting():
        for _ in range(3):
            step()


@on_gpu
def test_a_step_is_repeated_as_a_cuda_graph():
    models = [Net(rf.Point(), "cuda").train() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    given = tuple(x.cuda() for x in batch())
    steps = [
        step_of(model, torch.optim.Adam(model.parameters(), lr=1e-3, fused=True, capturable=True), given)
        for model in models
    ]
    for _ in range(5 + 3):
        wanted = steps[0]()
    aside = torch.cuda.Stream()
    with torch.cuda.stream(aside):
        for _ in range(3):
            steps[1]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = steps[1]()
    for _ in range(5):
        graph.replay()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@on_gpu
def test_replayed_steps_draw_anew():
    model = Net(rf.MeanField(), "cuda").train()
    step = step_of(model, torch.optim.SGD(model.parameters(), lr=0.0), tuple(x.cuda() for x in batch()))
    aside = torch.cuda.Stream()
    with torch.cuda.stream(aside):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    losses = []
    for _ in range(3):
        graph.replay()
        losses.append(float(loss))
    assert len(set(losses)) == 3


@pytest.fixture
def accelerate_on_gpu(monkeypatch):
    from accelerate.state import AcceleratorState  # noqa: PLC0415  It looks for a device once.

    monkeypatch.delenv("ACCELERATE_USE_CPU")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@on_gpu
@pytest.mark.usefixtures("accelerate_on_gpu")
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_fit_trains_and_cuts_on_a_gpu(cuda_graphs, tmp_path):
    torch.manual_seed(0)
    teacher = torch.randn(30, 2) @ torch.randn(2, 24) / 4
    x = torch.randn(2000, 24)
    y = x @ teacher.T + 0.1 * torch.randn(2000, 30)
    data = [(x[k : k + 100], y[k : k + 100]) for k in range(0, 2000, 100)]

    def nll(model: nn.Module, given: list[torch.Tensor]) -> torch.Tensor:
        return (model(given[0]) - given[1]).square().sum(1) / (2 * 0.1**2)

    def trained(epochs: int) -> tuple[nn.Module, list[dict]]:
        torch.manual_seed(1)
        model = rf.nn.Linear(24, 30, format=rf.TT(8, out_modes=(30,), in_modes=(24,)))
        groups = rf.parameter_groups(model, 1e-2)
        history = rf.fit(
            model,
            data,
            nll,
            epochs=epochs,
            num_data=2000,
            optimizer=torch.optim.Adam(groups),
            checkpoint=tmp_path / "run.pt",
            cuda_graphs=cuda_graphs,
            progress=False,
        )
        return model, history

    model, history = trained(30)
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    assert model.weight.ranks == {"r1": 2}
    assert (model.weight.dense().cpu() - teacher).norm() < 0.05 * teacher.norm()
    again, same = trained(30)
    assert same == history
    torch.testing.assert_close(again.weight.dense(), model.weight.dense())


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = rf.nn.Linear(6, 4, format=rf.TT(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        return -y if float(y.detach().sum()) > 0 else y


@on_gpu
@pytest.mark.usefixtures("accelerate_on_gpu")
def test_graphs_make_the_steps_that_fit_makes_without_them():
    data = [batch(32) for _ in range(6)] + [batch(7)]

    def nll(model: nn.Module, given: list[torch.Tensor]) -> torch.Tensor:
        return F.cross_entropy(model(*given[:-1]), given[-1], reduction="none")

    found = []
    for cuda_graphs in (False, True):
        torch.manual_seed(1)
        model = Net(rf.Point(), "cuda")
        options = {"epochs": 2, "num_data": 199, "selection": None, "cuda_graphs": cuda_graphs, "progress": False}
        history = rf.fit(model, data, nll, optimizer=torch.optim.Adam(model.parameters(), lr=1e-3), **options)
        found.append([*(torch.tensor(record["nll"]) for record in history), *model.state_dict().values()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@on_gpu
def test_gradients_of_a_reader_are_those_of_a_cpu():
    model = Reader()
    twin = Reader()
    twin.load_state_dict(model.state_dict())
    twin.cuda()
    for ids, labels in texts(3):
        for each, x, y in ((model, ids, labels), (twin, ids.cuda(), labels.cuda())):
            each.zero_grad()
            F.cross_entropy(each(x), y).backward()
        for one, other in zip(twin.parameters(), model.parameters(), strict=True):
            assert (one.grad.cpu() - other.grad).norm() <= 0.01 * other.grad.norm() + 1e-7


@on_gpu
@pytest.mark.usefixtures("accelerate_on_gpu")
@pytest.mark.parametrize("make", [Reader, lambda: Net(rf.Point(), "cpu")], ids=["reader", "net"])
def test_batches_of_many_shapes_train_alike_in_all_ways(make):
    is_reader = make is Reader
    data = texts(24) if is_reader else [batch(32 if k % 3 else 9) for k in range(24)]

    def nll(model: nn.Module, given: list[torch.Tensor]) -> torch.Tensor:
        return F.cross_entropy(model(*given[:-1]), given[-1], reduction="none")

    found = []
    for cuda_graphs in (False, True):
        torch.manual_seed(1)
        model = make()
        options = {"epochs": 2, "num_data": 1536, "selection": None, "cuda_graphs": cuda_graphs, "progress": False}
        history = rf.fit(
            model, data, nll, optimizer=torch.optim.Adam(model.parameters(), lr=1e-3, fused=True), **options
        )
        found.append([torch.tensor(record["nll"]) for record in history])
    torch.testing.assert_close(*map(torch.stack, found), rtol=1e-3, atol=1e-4)


@on_gpu
@pytest.mark.usefixtures("accelerate_on_gpu")
def test_a_model_that_looks_at_its_numbers_is_no_graph():
    data = [(torch.randn(8, 6), torch.randn(8, 4))] * 5
    with pytest.raises(ValueError, match=r"a step cannot be repeated as a CUDA graph: .*Pass cuda_graphs=False"):
        rf.fit(
            Branching(),
            data,
            lambda model, given: (model(given[0]) - given[1]).square().sum(1),
            epochs=1,
            num_data=40,
            cuda_graphs=True,
            progress=False,
        )


@on_gpu
def test_an_id_that_is_no_row_stops_the_device():
    script = (
        "import torch, rankfall as rf\n"
        "table = rf.nn.Embedding(1000, 12, format=rf.TTM(3), device='cuda')\n"
        "table(torch.tensor([3, 1000], device='cuda'))\n"
        "torch.cuda.synchronize()\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode
    assert "device-side assert" in run.stderr


def test_tables_never_look_at_their_ids_on_another_device(kind):
    for layer in (
        rf.nn.Embedding(10_000, 12, padding_idx=3, format=kind(3), device="meta"),
        rf.nn.EmbeddingBag(10_000, 12, padding_idx=3, format=kind(3), device="meta"),
    ):
        ids = torch.zeros(4, 9, dtype=torch.int64, device="meta")
        layer(ids).sum().backward()
        assert all(factor.grad is not None for factor in layer.weight.factors)


@of_compiler
def test_a_compiled_table_refuses_an_id_that_is_no_row():
    layer = rf.nn.Embedding(60, 12, format=rf.TTM(3))
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match="Embedding has 60 rows, and an id is none of them"):
        compiled(torch.tensor([3, 60]))
