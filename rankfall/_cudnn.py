# SPDX-License-Identifier: Apache-2.0
"""Whether cuDNN's recurrent layers give the gradients that torch's own give on a GPU: on some they do not.

There is an open report of it for H100s: https://github.com/pytorch/pytorch/issues/150700.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor, nn

_BATCH, _LENGTH = 64, 32
_FAR = 0.1  # Relative; TF32 and bfloat16 stay well below.

_Kind: TypeAlias = tuple[type[nn.RNNBase], tuple[int | bool, ...], torch.device, torch.dtype]
_TRIED: dict[_Kind, bool] = {}


@contextmanager
def cudnn_where_right(like: nn.RNNBase, x: Tensor) -> Iterator[None]:
    """Inside, a recurrent layer runs on cuDNN only if layers of its sizes have the right gradients there.

    Which is tried once for each kind of layer, but not while a CUDA graph is captured: a graph of a layer that has not
    run before has no cuDNN.

    Args:
        like: A layer of the same options.
        x: Its input.
    """
    device, is_narrow = x.device, torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(device.type) if is_narrow else x.dtype
    options = (like.input_size, like.hidden_size, like.num_layers, like.bias, like.bidirectional)
    if not _is_asked(device) or _agrees((type(like), options, device, dtype)):
        yield
    else:
        with _cudnn(wanted=False):
            yield


@contextmanager
def _cudnn(*, wanted: bool) -> Iterator[None]:
    """Inside, cuDNN runs nothing unless it is wanted."""
    before = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = before and wanted
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before


def _is_asked(device: torch.device) -> bool:
    return device.type == "cuda" and torch.backends.cudnn.enabled and not torch.compiler.is_compiling()


def _is_captured() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _agrees(kind: _Kind) -> bool:
    if kind not in _TRIED:
        if _is_captured():
            return False
        _TRIED[kind] = _is_right(*kind)
    return _TRIED[kind]


def _is_right(
    kind: type[nn.RNNBase], options: tuple[int | bool, ...], device: torch.device, dtype: torch.dtype
) -> bool:
    pairs = zip(*(_gradients(kind, options, device, dtype, cudnn=cudnn) for cudnn in (True, False)), strict=True)
    far = max(float((one - other).norm() / other.norm().clamp_min(1e-30)) for one, other in pairs)
    if far <= _FAR:
        return True
    message = (
        f"cuDNN's {kind.__name__} of hidden_size={options[1]} gives other gradients on {device} than torch's own (they "
        f"differ by {far:.0%}), so layers like it run without cuDNN, which takes longer."
    )
    warnings.warn(message, RuntimeWarning, stacklevel=2)
    return False


def _gradients(
    kind: type[nn.RNNBase], options: tuple[int | bool, ...], device: torch.device, dtype: torch.dtype, *, cudnn: bool
) -> list[Tensor]:
    """Those of the input and of all weights, for random numbers that are always the same."""
    *sizes, bias, bidirectional = options
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        torch.manual_seed(0)
        layer = kind(*sizes, bias, bidirectional=bidirectional, device=device, dtype=dtype)  # pyright: ignore
        x = torch.randn(_LENGTH, _BATCH, int(sizes[0]), device=device, dtype=dtype, requires_grad=True)
        direction = torch.randn(_LENGTH, _BATCH, int(sizes[1]) * (1 + bidirectional), device=device, dtype=dtype)
        with _cudnn(wanted=cudnn), warnings.catch_warnings():
            # torch lays weights of bfloat16 one by one, and says so.
            warnings.filterwarnings("ignore", "RNN module weights are not part of single contiguous chunk", UserWarning)
            (layer(x)[0] * direction).sum().backward()
    return [tensor.grad.float() for tensor in (x, *layer.parameters()) if tensor.grad is not None]
