# SPDX-License-Identifier: Apache-2.0
"""The cases of benchmarks/speed.py: for each a dense step, rankfall's, and those of peers that are installed."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from _device import Step, on_gpu
from _peers import embedding_peers, linear_peers, mean_field_peers
from torch import Tensor, nn

import rankfall as rf
from rankfall._products import product


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        name: What it is called on the command line.
        what: What is computed, for the table.
        make: Makes the step of every rival by its name; a step is made only where it is asked for.
        limit: (floating-point operations, bytes moved) that a step of this weight cannot do without.
    """

    name: str
    what: str
    make: Mapping[str, Callable[[], Step]]
    limit: tuple[float, float]


@dataclass(frozen=True)
class _Matrix:
    out_modes: tuple[int, ...]
    in_modes: tuple[int, ...]
    batch: int

    @property
    def shape(self) -> tuple[int, int]:
        return math.prod(self.out_modes), math.prod(self.in_modes)


_L1 = _Matrix((8, 8, 8), (7, 14, 8), 128)
_L2 = _Matrix((8, 8, 8, 8), (8, 8, 8, 8), 256)
_L3 = _Matrix((12, 16, 16), (8, 8, 12), 2048)


def _two_modes(modes: tuple[int, ...]) -> tuple[int, ...]:
    """The same width in two modes, as even as the given ones allow."""
    splits = [(math.prod(modes[:k]), math.prod(modes[k:])) for k in range(1, len(modes))]
    return min(splits, key=max)


class _DenseByOneDNN(nn.Linear):
    """The dense layer with the products that rankfall makes, which torch's own does not."""

    def forward(self, input: Tensor) -> Tensor:
        return product(input, self.weight.T, self.bias)


def _linear(name: str, matrix: _Matrix, kind: type[rf.TT], rank: int) -> Case:
    wide = kind in (rf.CP, rf.Tucker)
    out_modes = _two_modes(matrix.out_modes) if wide else matrix.out_modes
    in_modes = _two_modes(matrix.in_modes) if wide else matrix.in_modes
    (rows, width), batch = matrix.shape, matrix.batch

    def step_of(layer: nn.Module) -> Step:
        x = torch.randn(batch, width, requires_grad=True)
        direction = torch.randn(batch, rows)

        def step() -> None:
            x.grad = None
            layer.zero_grad()
            layer(x).backward(direction)

        return step

    def ours() -> Step:
        format = kind(rank, out_modes=out_modes, in_modes=in_modes)
        return step_of(rf.nn.Linear(width, rows, format=format, posterior=rf.Point()))

    peers = linear_peers(kind, in_modes, out_modes, rank)
    by_onednn = {} if on_gpu() else {"dense by oneDNN": lambda: step_of(_DenseByOneDNN(width, rows))}
    rivals = {
        "dense": lambda: step_of(nn.Linear(width, rows)),
        **by_onednn,
        "rankfall": ours,
        **{name: lambda make=make: step_of(make()) for name, make in peers.items()},
    }
    weight = rf.LowRankTensor((rows, width), kind(rank, out_modes=out_modes, in_modes=in_modes), device="meta")
    flops = min(2 * rows * width, _least_flops(weight)) * batch * 3
    moved = 4 * (2 * batch * (rows + width) + 2 * sum(f.numel() for f in weight.factors))
    return Case(name, f"linear {width} to {rows}, batch {batch}, {kind.__name__} rank {rank}", rivals, (flops, moved))


def _mean_field(name: str, matrix: _Matrix, kind: type[rf.TT], rank: int) -> Case:
    """A draw, the KL and a step of Adam besides: what a Bayesian layer is trained by."""
    (rows, width), batch = matrix.shape, matrix.batch
    x, direction = torch.randn(batch, width), torch.randn(batch, rows)

    def step_of(layer: nn.Module, kl: Callable[[], Tensor]) -> Step:
        optimizer = _adam(layer)

        def step() -> None:
            optimizer.zero_grad()
            y = layer(x)
            ((y * direction).mean() + kl() / 60_000).backward()
            optimizer.step()

        return step

    def ours() -> Step:
        format = kind(rank, out_modes=matrix.out_modes, in_modes=matrix.in_modes)
        layer = rf.nn.Linear(width, rows, format=format)
        return step_of(layer, lambda: rf.kl(layer))

    def theirs(make: Callable[[], nn.Module]) -> Step:
        layer = make()
        return step_of(layer, lambda: layer.kl)

    def dense() -> Step:
        return step_of(nn.Linear(width, rows), lambda: torch.zeros(()))

    peers = mean_field_peers(width, rows)
    weight = rf.LowRankTensor(
        (rows, width), kind(rank, out_modes=matrix.out_modes, in_modes=matrix.in_modes), device="meta"
    )
    numbers = sum(f.numel() for f in weight.factors)
    flops = min(2 * rows * width, _least_flops(weight)) * batch * 3
    what = f"linear {width} to {rows}, batch {batch}, {kind.__name__} rank {rank}, a draw, the KL, and Adam"
    rivals = {"dense": dense, "rankfall": ours, **{n: lambda make=make: theirs(make) for n, make in peers.items()}}
    return Case(name, what, rivals, (flops, 4 * (2 * batch * (rows + width) + 20 * numbers)))


def _least_flops(weight: rf.LowRankTensor) -> int:
    """Operations of a forward pass for each row, by the best split in two."""
    ranks, (rows, width) = weight.ranks, weight.shape
    if isinstance(weight.format, rf.TTM):
        outs, ins = weight.layout.modes
        return min(
            2 * rank * (width * math.prod(outs[k:]) + rows * math.prod(ins[:k]))
            for k, rank in enumerate(ranks.values(), 1)
        )
    middle = list(ranks.values())
    if isinstance(weight.format, rf.Tucker):
        middle = [min(math.prod(middle[:2]), math.prod(middle[2:]))]
    between = len(weight.layout.modes[0])
    rank = middle[between - 1] if isinstance(weight.format, rf.TT) else middle[0]
    if isinstance(weight.format, rf.TR):  # Two bonds join the halves.
        rank = middle[between - 1] * middle[-1]
    return 2 * rank * (rows + width)


@dataclass(frozen=True)
class _Table:
    rows: int
    width: int
    out_modes: tuple[int, ...]
    in_modes: tuple[int, ...]


_E1 = _Table(25_000, 256, (5, 5, 5, 5, 5, 8), (2, 2, 2, 2, 4, 4))
_E2 = _Table(10_131_227, 128, (200, 220, 250), (4, 4, 8))


def zipf(rows: int, count: int, *, seed: int = 0, exponent: float = 1.05) -> Tensor:
    """Ids with Zipf's frequencies, the frequent ones scattered over the table."""
    numbers = np.random.default_rng(seed)
    weights = np.cumsum(1.0 / np.arange(1, rows + 1) ** exponent)
    ranks = np.searchsorted(weights, numbers.random(count) * weights[-1])
    # A multiplication by a number without a common divisor is a permutation that needs no memory.
    return _here(torch.from_numpy((ranks * 2_654_435_761 + 12_345) % rows))


def _here(numbers: Tensor) -> Tensor:
    return numbers.to(torch.get_default_device())


def _trained(layer: nn.Module, forward: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> Step:
    direction = torch.randn_like(forward())

    def step() -> None:
        optimizer.zero_grad()
        forward().backward(direction)
        optimizer.step()

    return step


def _adam(layer: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(layer.parameters(), lr=1e-3, fused=True, capturable=on_gpu())


def _embedding(name: str, table: _Table, kind: type[rf.TT], rank: int, ids: Tensor) -> Case:
    given = {"out_modes": table.out_modes, "in_modes": table.in_modes}
    if kind in (rf.CP, rf.Tucker):
        given = {"out_modes": _two_modes(table.out_modes), "in_modes": _two_modes(table.in_modes)}
    format = kind(rank, **given)

    def step_of(layer: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
        return _trained(layer, lambda: layer(ids), optimizer)

    def ours() -> Step:
        layer = rf.nn.Embedding(table.rows, table.width, format=format, posterior=rf.Point())
        return step_of(layer, _adam(layer))

    rivals = {**_dense_tables(table, nn.Embedding, step_of), "rankfall": ours}
    peers = embedding_peers(kind, given["out_modes"], given["in_modes"], rank)

    def theirs(make: Callable[[], nn.Module]) -> Step:
        layer = make()
        return step_of(layer, _adam(layer))

    rivals |= {name: lambda make=make: theirs(make) for name, make in peers.items()}
    distinct = len(ids.unique())
    weight = rf.LowRankTensor((table.rows, table.width), format, device="meta")
    numbers = sum(f.numel() for f in weight.factors)
    last = list(weight.ranks.values())[-1]
    moved = 4 * (2 * ids.numel() * table.width + 4 * distinct * table.width + 10 * numbers)
    what = f"{ids.numel():,} ids of a table {table.rows:,} x {table.width}, {kind.__name__} rank {rank}, and Adam"
    return Case(name, what, rivals, (6 * distinct * table.width * last, moved))


def _dense_tables(
    table: _Table, kind: type[nn.Embedding] | type[nn.EmbeddingBag], step_of: Callable[..., Step], **options: object
) -> dict[str, Callable[[], Step]]:
    small = table.rows * table.width < 10**8

    def made(sparse: bool) -> nn.Module:
        # Zeros are not touched until they are used, so that a big table is made in no time.
        weight = torch.zeros(table.rows, table.width)
        return kind.from_pretrained(weight, freeze=False, sparse=sparse, **options)

    def with_adam() -> Step:
        layer = made(sparse=False)
        return step_of(layer, _adam(layer))

    def with_sgd() -> Step:
        layer = made(sparse=True)
        return step_of(layer, torch.optim.SGD(layer.parameters(), lr=1e-3))

    # SparseAdam keeps two more tables of 5 GB; SGD is the faster rival besides.
    return {"dense": with_adam if small else with_sgd}


def _bag(name: str, table: _Table, kind: type[rf.TT], rank: int, bags: int) -> Case:
    sizes = _here(torch.from_numpy(np.random.default_rng(1).integers(10, 51, bags)))
    offsets = F.pad(sizes.cumsum(0), (1, 0))[:-1]
    ids = zipf(table.rows, int(sizes.sum()))
    format = kind(rank, out_modes=table.out_modes, in_modes=table.in_modes)

    def step_of(layer: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
        return _trained(layer, lambda: layer(ids, offsets), optimizer)

    def ours() -> Step:
        layer = rf.nn.EmbeddingBag(table.rows, table.width, mode="sum", format=format, posterior=rf.Point())
        return step_of(layer, _adam(layer))

    rivals = {**_dense_tables(table, nn.EmbeddingBag, step_of, mode="sum"), "rankfall": ours}
    distinct = len(ids.unique())
    what = (
        f"{bags} bags of 10 to 50 ids of a table {table.rows:,} x {table.width}, {kind.__name__} rank {rank}, and Adam"
    )
    moved = 4 * (3 * distinct * table.width + 10 * rank * (table.rows // 40_000) * table.width)
    return Case(name, what, rivals, (6 * distinct * table.width * rank, moved))


def cases() -> Sequence[Case]:
    """All cases, in the order of the table."""
    generator = torch.Generator().manual_seed(0)
    words = _here(torch.randint(_E1.rows, (256, 200), generator=generator, device="cpu"))
    clicks = zipf(_E2.rows, 2048)
    return [
        _linear("L1-TTM", _L1, rf.TTM, 20),
        _linear("L1-TT", _L1, rf.TT, 20),
        _linear("L1-CP", _L1, rf.CP, 50),
        _linear("L1-Tucker", _L1, rf.Tucker, 20),
        _linear("L1-TR", _L1, rf.TR, 5),
        _mean_field("L1-MeanField", _L1, rf.TT, 20),
        _linear("L2-TTM", _L2, rf.TTM, 16),
        _linear("L2-TT", _L2, rf.TT, 16),
        _linear("L2-CP", _L2, rf.CP, 100),
        _linear("L2-Tucker", _L2, rf.Tucker, 5),
        _linear("L2-TR", _L2, rf.TR, 5),
        _mean_field("L2-MeanField", _L2, rf.TT, 16),
        _linear("L3-TTM", _L3, rf.TTM, 32),
        _linear("L3-TT", _L3, rf.TT, 32),
        _linear("L3-CP", _L3, rf.CP, 100),
        _linear("L3-Tucker", _L3, rf.Tucker, 16),
        _linear("L3-TR", _L3, rf.TR, 6),
        _embedding("E1-TTM", _E1, rf.TTM, 20, words),
        _embedding("E1-TT", _E1, rf.TT, 20, words),
        _embedding("E1-CP", _E1, rf.CP, 100, words),
        _embedding("E1-Tucker", _E1, rf.Tucker, 5, words),
        _embedding("E2-TTM", _E2, rf.TTM, 16, clicks),
        _bag("E2-bag-TTM", _E2, rf.TTM, 16, 256),
    ]
