# SPDX-License-Identifier: Apache-2.0
"""Layers of other libraries that are installed, for benchmarks/speed.py.

    pip install tensorly-torch torchTT tednet
    pip install --no-deps bayesian-torch

bayesian-torch asks for torchvision and tensorboard, which its linear layer does without.
"""

import importlib
import importlib.util
import io
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import redirect_stdout
from importlib.metadata import version

import torch
from torch import nn

import rankfall as rf

Modes = tuple[int, ...]
Make = Callable[[], nn.Module]


def is_peer(rival: str) -> bool:
    """Whether a rival of a case is another library's: neither dense nor rankfall, nor one of them as a graph."""
    return not rival.startswith(("dense", "rankfall"))


def packages(rivals: Iterable[str]) -> list[str]:
    """The packages of the peers among rivals, whose names begin with that of the package."""
    return list(dict.fromkeys(rival.partition(" ")[0].rstrip(",") for rival in rivals if is_peer(rival)))


def versions(rivals: Iterable[str]) -> dict[str, str]:
    """The installed versions of these packages."""
    return {package: version(package) for package in packages(rivals)}


def linear_peers(kind: type[rf.TT], in_modes: Modes, out_modes: Modes, rank: int) -> Mapping[str, Make]:
    """Their linear layers of a format, by the names of the libraries; each takes a batch of rows."""
    found: dict[str, Make] = {}
    if (name := _TENSORLY.get(kind)) and _has("tltorch"):
        for way in ("factorized", "reconstructed"):
            found[f"TensorLy-Torch {way}"] = lambda way=way: _tensorly_linear(in_modes, out_modes, name, rank, way)
    if kind is rf.TTM and _has("torchtt"):
        found["torchTT"] = lambda: _torchtt_linear(in_modes, out_modes, rank)
    if kind in _TEDNET and _has("tednet"):
        found["tednet"] = lambda: _tednet_linear(kind, in_modes, out_modes, rank)
    return found


def mean_field_peers(in_features: int, out_features: int) -> Mapping[str, Make]:
    """Their dense linear layers with a mean and a standard deviation for each weight."""
    if not _has("bayesian_torch"):
        return {}
    return {"bayesian-torch": lambda: _bayesian_linear(in_features, out_features)}


def embedding_peers(kind: type[rf.TT], out_modes: Modes, in_modes: Modes, rank: int) -> Mapping[str, Make]:
    """Their embeddings of a format."""
    name = _TENSORLY.get(kind)
    if not name or not _has("tltorch"):
        return {}
    return {"TensorLy-Torch": lambda: _tensorly_embedding(out_modes, in_modes, name, rank)}


_TENSORLY = {rf.TTM: "blocktt", rf.CP: "cp", rf.Tucker: "tucker"}
_TEDNET = {rf.TTM: "tensor_train.TTLinear", rf.CP: "cp.CPLinear", rf.TR: "tensor_ring.TRLinear"}


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _drawn(layer: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_(0, 0.1)
    return layer


def _their_ranks(in_modes: Modes, out_modes: Modes, factorization: str, rank: int) -> object:
    """The rank as TensorLy-Torch takes it: with both ends of a chain, and no more than a mode in Tucker."""
    if factorization == "blocktt":
        return (1, *(rank for _ in in_modes[1:]), 1)
    if factorization == "tucker":
        return tuple(min(rank, n) for n in (*out_modes, *in_modes))
    return rank


def _tensorly_linear(in_modes: Modes, out_modes: Modes, factorization: str, rank: int, way: str) -> nn.Module:
    import tltorch  # noqa: PLC0415  only where it is asked for

    layer = tltorch.FactorizedLinear(
        in_modes,
        out_modes,
        bias=True,
        factorization=factorization,
        rank=_their_ranks(in_modes, out_modes, factorization, rank),
        implementation=way,
    )
    return _drawn(layer)


def _tensorly_embedding(out_modes: Modes, in_modes: Modes, factorization: str, rank: int) -> nn.Module:
    import tltorch  # noqa: PLC0415

    layer = tltorch.FactorizedEmbedding(
        math.prod(out_modes),
        math.prod(in_modes),
        auto_tensorize=False,
        tensorized_num_embeddings=out_modes,
        tensorized_embedding_dim=in_modes,
        factorization=factorization,
        rank=_their_ranks(in_modes, out_modes, factorization, rank),
    )
    return _drawn(layer)


class _Unfolded(nn.Module):
    """A layer of modes that takes and gives rows."""

    def __init__(self, layer: nn.Module, in_modes: Modes) -> None:
        super().__init__()
        self.layer, self.in_modes = layer, in_modes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.view(-1, *self.in_modes)).flatten(1)


def _torchtt_linear(in_modes: Modes, out_modes: Modes, rank: int) -> nn.Module:
    from torchtt.nn import LinearLayerTT  # noqa: PLC0415

    ranks = [1, *(rank for _ in in_modes[1:]), 1]
    return _Unfolded(LinearLayerTT(list(in_modes), list(out_modes), ranks), in_modes)


def _tednet_linear(kind: type[rf.TT], in_modes: Modes, out_modes: Modes, rank: int) -> nn.Module:
    module, _, name = _TEDNET[kind].partition(".")
    ranks = {rf.TTM: [rank] * (len(in_modes) - 1), rf.CP: rank, rf.TR: [rank] * (len(in_modes) + len(out_modes))}
    cls = getattr(importlib.import_module(f"tednet.tnn.{module}"), name)
    with redirect_stdout(io.StringIO()):  # It prints its compression.
        return cls(list(in_modes), list(out_modes), ranks[kind])


class _WithKL(nn.Module):
    """A layer of bayesian-torch that leaves the KL of its last call in `kl`."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out, self.kl = self.layer(x)
        return out


def _bayesian_linear(in_features: int, out_features: int) -> nn.Module:
    from bayesian_torch.layers.variational_layers.linear_variational import LinearReparameterization  # noqa: PLC0415

    return _WithKL(LinearReparameterization(in_features, out_features))
