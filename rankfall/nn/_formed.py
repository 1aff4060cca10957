# SPDX-License-Identifier: Apache-2.0
"""Layers that form their weights once per forward and leave everything else to torch's own module."""

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from operator import attrgetter
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rankfall._formats import CP, TTM, Format, Tucker
from rankfall._layout import Modes
from rankfall._modes import balanced_modes, mode_count
from rankfall._tensor import LowRankTensor

_MODE_SIZE = 5.0
_MOST_PADDED = 1.1


class Formed(nn.Module):
    """A torch module that runs on weights formed from low-rank tensors; all its options are torch's own code.

    A recurrent or an attention layer uses each weight for every step of a sequence, so forming it costs little beside
    that, and torch's fused kernels take it. The torch module is kept without parameters of its own, on the meta device.
    Its options are read and set there.
    """

    _options: ClassVar[tuple[str, ...]]

    def _hold(self, like: nn.Module, weights: Mapping[str, LowRankTensor], others: Mapping[str, nn.Parameter]) -> None:
        own = {f"{path}.{leaf}".lstrip(".") for path, part in like.named_modules() for leaf in part._parameters}
        computed_from = others.keys() - own
        if computed_from:
            raise ValueError(
                f"computes a bias from other parameters ({', '.join(sorted(computed_from))}). Undo that first, for "
                "example with torch.nn.utils.prune.remove, or leave it out with filter_fn."
            )
        # In a tuple, so that it is no submodule and nothing of it is a parameter.
        self._torch, self._spare = (like.to("meta"),), []
        for name, value in (*weights.items(), *others.items()):
            path, _, leaf = name.rpartition(".")
            setattr(self._owner(path), leaf, value)
        self._weights, self._others = tuple(weights), tuple(others)

    def _owner(self, path: str) -> nn.Module:
        if path and not hasattr(self, path):
            setattr(self, path, nn.Module())
        return self.get_submodule(path)

    @property
    def like(self) -> Any:  # noqa: ANN401  torch's module of the same name
        """The torch module that has the options, on the meta device; copies of it do the work."""
        return self._torch[0]

    @property
    def weight_names(self) -> tuple[str, ...]:
        """Torch's names of the weights that are low-rank tensors; a dot leads into a submodule."""
        return self._weights

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  torch's options: input_size, num_heads, batch_first, ...
        if name in self._options:
            return getattr(self.__dict__["_torch"][0], name)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:  # noqa: ANN401
        if name not in self._options:
            super().__setattr__(name, value)
            return
        setattr(self.like, name, value)
        self._spare = []  # Those that are there, or in a call of another thread, have the old value.

    def _run(self, *arguments: Any, **options: Any) -> Any:  # noqa: ANN401  what torch's forward takes and gives
        """What torch's forward gives, of a module of this call alone: weights are put into it, and threads share us."""
        # Not is_compiling, which is true in all threads while one of them compiles.
        if torch.compiler.is_dynamo_compiling():
            return self._run_by(self.like, *arguments, **options)
        spare = self._spare
        try:
            like = spare.pop()
        except IndexError:
            like = copy.deepcopy(self.like)
        try:
            return self._run_by(like, *arguments, **options)
        finally:
            spare.append(like)

    def _run_by(self, like: Any, *arguments: Any, **options: Any) -> Any:  # noqa: ANN401
        like.train(self.training)
        values: dict[str, Tensor] = {}
        for name in self._others:
            parameter = self._parameter(name)
            # torch lays a recurrent layer's weights side by side for cuDNN, and has the tensors that it was given point
            # there. A parameter must stay where it is: CUDA graphs know it by its place.
            values[name] = parameter.view_as(parameter)
        for name in self._weights:
            tensor = self.get_submodule(name)
            assert isinstance(tensor, LowRankTensor)
            formed = tensor.sample() if tensor.training else tensor.dense()
            # Autocast makes it of the narrow type, and cuDNN takes weights and biases of one type only.
            values[name] = formed.to(tensor.factors[0].dtype)
        own = dict(like.named_parameters())
        try:
            return torch.func.functional_call(like, values, arguments, options)
        finally:
            # A recurrent module keeps a list of its weights beside them, which would hold this call's graph.
            for name, parameter in own.items():
                path, _, leaf = name.rpartition(".")
                setattr(like.get_submodule(path), leaf, parameter)

    def _parameter(self, name: str) -> Tensor:
        """A parameter, or the plain tensor that stands in its place inside torch.func.functional_call."""
        value: Tensor = attrgetter(name)(self)
        return value

    def _extra_lines(self) -> str:
        return "".join(f"\n  {name}: {self.get_submodule(name).describe()}" for name in self._weights)  # pyright: ignore


def others_of(module: nn.Module, weights: Mapping[str, LowRankTensor]) -> dict[str, nn.Parameter]:
    """The parameters of a torch module that stay dense, by name."""
    return {name: p for name, p in module.named_parameters() if name not in weights}


def blocks_apart(format: Format, blocks: int, shape: tuple[int, int]) -> Format:
    """A format whose first mode is the block (the gate, or query, key, value) of a weight of stacked blocks.

    Modes that are given stay; the weights of a layer differ in width, and where in_modes are of another one, it is
    split into as many. Out-modes are chosen without padding, which would mix the blocks.

    Example:
        >>> blocks_apart(rf.TT(8), 4, (512, 256)).out_modes
        (4, 4, 4, 8)
        >>> blocks_apart(rf.CP(8), 4, (508, 256)).out_modes
        (4, 127)
        >>> blocks_apart(rf.TTM(8, out_modes=(4, 128, 1), in_modes=(1, 1, 256)), 4, (512, 128)).in_modes
        (1, 1, 128)

    Args:
        format: The format of the layer.
        blocks: How many blocks are stacked.
        shape: The shape of the weight.
    """
    given = _split_alike(format.in_modes, shape[1])
    if blocks == 1:
        fits = format.out_modes is not None and math.prod(format.out_modes) == shape[0]
        return replace(format, out_modes=format.out_modes if fits else None, in_modes=given)
    if format.out_modes is not None:
        return replace(format, in_modes=given)
    height = shape[0] // blocks
    if isinstance(format, CP | Tucker):
        return replace(format, out_modes=(blocks, height), in_modes=given)
    count = mode_count(height, _MODE_SIZE)
    if isinstance(format, TTM) and given is not None:
        count = len(given) - 1
    modes = balanced_modes(height, max(count, 1))
    modes = modes if math.prod(modes) == height else (1,) * (len(modes) - 1) + (height,)
    if isinstance(format, TTM) and given is None:
        given = (1, *balanced_modes(shape[1], len(modes)))
        given = given if math.prod(given) <= shape[1] * _MOST_PADDED else None
    return replace(format, out_modes=(blocks, *modes), in_modes=given)


def _split_alike(modes: Modes | None, width: int) -> Modes | None:
    """Modes if they are of this width; else as many of it, ones staying ones; None if that takes much padding."""
    if modes is None or width <= math.prod(modes) <= width * _MOST_PADDED:
        return modes
    split = iter(balanced_modes(width, max(sum(mode > 1 for mode in modes), 1)))
    found = tuple(next(split) if mode > 1 else 1 for mode in modes)
    return found if width <= math.prod(found) <= width * _MOST_PADDED else None
