# SPDX-License-Identifier: Apache-2.0
"""A draw of many factors with their KL by compiled code, and their gradients by one more call after the backward."""

import ctypes
import math
from collections.abc import Sequence
from ctypes import c_double, c_int64, c_uint64, c_void_p
from functools import cache

import torch
from torch import Tensor

from rankfall._compiled import Source, addresses, compiled, is_unseen
from rankfall._divergence import CORE_STD, Factors, Flat, arranged, draw_with_kl, joined_factors
from rankfall._priors import MIN_SCALE, HalfCauchy, LogUniform, Prior


class _Library:
    """The functions of _joint_draw.c.

    Args:
        loaded: What has been compiled.

    Raises:
        ValueError: If what it gives is wrong.
    """

    def __init__(self, loaded: ctypes.CDLL) -> None:
        one = c_void_p
        self.draw, self.hand_on = loaded.draw, loaded.hand_on_gradients
        self.draw.restype, self.hand_on.restype = c_double, None
        prior = c_double, c_double, c_double, c_double
        self.draw.argtypes = (c_int64, one, one, one, c_uint64, c_int64, one, *prior, one, one, one, one, one)
        self.hand_on.argtypes = (c_int64, one, one, one, c_double, one, one, one, one, one)
        self._try()

    def _try(self) -> None:
        """Draws two factors of 40 entries, one of two slices and one of one, of mean 3 and standard deviation 1/2."""
        means, log_stds = torch.full((2, 40), 3.0, device="cpu"), torch.full((2, 40), math.log(0.5), device="cpu")
        counts, moments = torch.tensor([20.0, 20.0, 40.0]), torch.empty(5, dtype=torch.float64, device="cpu")
        precisions, entries = torch.empty(5, device="cpu"), torch.empty(5, 80, device="cpu")
        factors = 2, (c_int64 * 8)(20, 2, 1, 0, 1, 1, 40, 2), addresses(means)
        *written, of_mean, of_log_std = (row.data_ptr() for row in entries)
        slices, log_uniform = (3, counts.data_ptr()), (0.0, 0.0, 1.0, 0.0)
        addressed = moments.data_ptr(), precisions.data_ptr(), *written
        kl = self.draw(*factors, addresses(log_stds), 0, *slices, *log_uniform, *addressed)
        self.hand_on(*factors, addresses(means), 1.0, precisions.data_ptr(), *written[1:], of_mean, of_log_std)
        drawn, away, variances, *gradients = entries
        variance = (counts * 9.25 / (counts + 1)).double()
        wanted_kl = float((counts + 1).double() @ (1 + variance.log())) / 2 - 80 * math.log(0.5) - 40
        pull = torch.cat([variance[:2].repeat(20), variance[2:].expand(40)]).float().reciprocal()
        wanted = 3.0 + away, torch.full_like(away, 0.25), 3.0 + 3.0 * pull, 3.0 * away + 0.25 * pull - 1.0
        right = all(
            torch.allclose(a, b, atol=1e-5) for a, b in zip((drawn, variances, *gradients), wanted, strict=True)
        )
        # Standard deviations of a mean and of a spread of 80 are .11 and .08.
        noise = 2 * away
        if not right or abs(kl - wanted_kl) > 1e-3 or abs(noise.mean()) > 0.5 or abs(noise.std() - 1) > 0.4:
            raise ValueError("its results are wrong")


@cache
def library() -> _Library | None:
    """The functions, as `compiled` says."""
    source = Source("_joint_draw.c", ("-fno-math-errno", "-fno-trapping-math"))
    return compiled(source, _Library, "factors are drawn by torch")


def has_draw(prior: Prior, tensors: Sequence[Factors]) -> bool:
    """Whether compiled code can draw such factors: float32 on the CPU, under one of this library's priors."""
    if type(prior) not in (HalfCauchy, LogUniform) or not all(t.log_stds for t in tensors):
        return False
    kinds = {(p.device.type, p.dtype) for p in _parameters(tensors)}
    return kinds == {("cpu", torch.float32)} and library() is not None


def _parameters(tensors: Sequence[Factors]) -> list[Tensor]:
    return [p for t in tensors for p in (*t.means, *t.log_stds)]


class CompiledDraw:
    """Draws of the factors of tensors of a kind, with their KL, where `has_draw` says so.

    Draws and KL are leaves of autograd's graph. Once a backward pass has given them gradients, `hand_on_` gives means
    and log standard deviations theirs: two passes over all entries, in place of some forty calls of torch and a node of
    the graph for each factor. Where gradients could not be followed so, it is `draw_with_kl`.

    Args:
        prior: Of all tensors.
        tensors: Their factors, which may change in size.
    """

    def __init__(self, prior: Prior, tensors: Sequence[Factors]) -> None:
        self._prior, self._tensors = prior, tensors
        self._parameters = _parameters(tensors)
        self._seed = torch.zeros((), dtype=torch.int64, device="cpu")
        self._state: list[tuple[int, torch.Size, bool]] = []
        self._buffers: _Buffers | None = None
        self._kl: Tensor | None = None

    def __call__(self) -> tuple[Tensor, list[list[Tensor]]]:
        """As `draw_with_kl`; draws stay as they are until the next one."""
        self._kl = None
        buffers = self._present() if torch.is_grad_enabled() and is_unseen() else None
        if buffers is None:
            return draw_with_kl(self._prior, self._tensors)
        value = buffers.draw(self._prior, int(self._seed.random_()))
        self._kl = torch.full((), value, dtype=torch.float32, device="cpu", requires_grad=True)
        return self._kl, buffers.draws

    def hand_on_(self) -> None:
        """Adds the gradients of the last draw and its KL to those of the parameters."""
        if self._kl is None or self._buffers is None:
            return
        of_kl, self._kl = self._kl.grad, None
        self._buffers.hand_on_(0.0 if of_kl is None else float(of_kl))

    def _present(self) -> "_Buffers | None":
        """Buffers for today's factors; None where one cannot be drawn so, or its gradient could not be handed on."""
        state = [(p.data_ptr(), p.shape, p.requires_grad) for p in self._parameters]
        if state != self._state:
            usable = has_draw(self._prior, self._tensors) and all(map(_waits_for_nothing, self._parameters))
            self._buffers, self._state = _Buffers(self._tensors) if usable else None, state
        return self._buffers


def _waits_for_nothing(parameter: Tensor) -> bool:
    """Whether a parameter is trained, has no gaps, and no hook that its gradient would have to go through."""
    hooks = parameter._backward_hooks or parameter._post_accumulate_grad_hooks  # pyright: ignore
    return parameter.requires_grad and parameter.is_contiguous() and not hooks


class _Buffers:
    """What factors of today's shapes are drawn to, all after each other.

    Attributes:
        draws: The leaves of each tensor.
    """

    def __init__(self, tensors: Sequence[Factors]) -> None:
        self._flat, self._parameters = joined_factors(tensors)
        flat, count = self._flat, len(self._flat.order)
        means, log_stds = self._parameters[:count], self._parameters[count:]
        numbers = [n for place in flat.places for n in (*place.shape, place.first)]
        slices, entries = len(flat.counts), sum(map(Tensor.numel, means))
        # Moments of slices and their precisions; draws, their distance from the means, and variances.
        self._moments = torch.empty(slices + 2, dtype=torch.float64, device="cpu")
        self._precisions = self._moments.new_empty(slices + 2, dtype=torch.float32)
        self._drawn, self._away, self._variances = self._precisions.new_empty(3, entries)
        self._gradients = self._precisions.new_empty(2, entries)
        self._views = self._viewed(self._gradients)
        self._leaves = [one.detach().requires_grad_() for one in _views(self._drawn, flat, means)]
        self.draws = arranged(self._leaves, flat, tensors)
        places = (c_int64 * len(numbers))(*numbers)
        self._factors = count, places, addresses(means)
        self._of_draw = addresses(log_stds), slices, flat.counts.data_ptr()
        self._written = [t.data_ptr() for t in (self._moments, self._precisions, self._drawn)]
        self._kept = self._away.data_ptr(), self._variances.data_ptr()

    def draw(self, prior: Prior, seed: int) -> float:
        """Draws all factors; returns their KL."""
        compiled = library()
        assert compiled is not None, "who has made this has looked"
        # A backward pass through an earlier draw is refused from here on.
        torch.autograd.graph.increment_version(self._drawn)
        log_stds, slices, counts = self._of_draw
        of_prior = prior.scale if isinstance(prior, HalfCauchy) else 0.0, MIN_SCALE**2, CORE_STD
        written = *self._written, *self._kept
        entries = self._flat.core_entries
        return compiled.draw(*self._factors, log_stds, seed, slices, counts, *of_prior, entries, *written)

    def hand_on_(self, of_kl: float) -> None:
        """Adds to the gradients of all parameters, and takes away those of the draws."""
        compiled = library()
        assert compiled is not None, "who has made this has looked"
        of_draws = []
        for leaf in self._leaves:
            found, leaf.grad = leaf.grad, None
            of_draws.append(None if found is None else found.contiguous())
        before = [p.grad for p in self._parameters]
        if all(gradient is None for gradient in before):
            gradients, views = self._gradients, self._views
        else:  # What is there already may be these very gradients, of an earlier step.
            gradients = torch.empty_like(self._gradients)
            views = self._viewed(gradients)
        read = self._precisions.data_ptr(), *self._kept
        of_means, of_log_stds = gradients.data_ptr(), gradients.data_ptr() + gradients.stride(0) * gradients.itemsize
        compiled.hand_on(*self._factors, addresses(of_draws), of_kl, *read, of_means, of_log_stds)
        for parameter, gradient, found in zip(self._parameters, before, views, strict=True):
            parameter.grad = found if gradient is None else gradient.add_(found)

    def _viewed(self, gradients: Tensor) -> list[Tensor]:
        """Of means, then of log standard deviations, in the shapes of the parameters."""
        count = len(self._flat.order)
        return [view for row in gradients for view in _views(row, self._flat, self._parameters[:count])]


def _views(values: Tensor, flat: Flat, like: Sequence[Tensor]) -> list[Tensor]:
    return [values[place.entries].view(one.shape) for place, one in zip(flat.places, like, strict=True)]
