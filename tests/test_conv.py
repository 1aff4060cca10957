# SPDX-License-Identifier: Apache-2.0
"""Convolutions against torch's own layers with a kernel that shares no code with the library."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import rankfall as rf
from laws import close, drawn, make, naive_dense
from rankfall import _contract
from rankfall._convolve import conv_plan, convolve_by, parts_of

TORCH = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
OURS = {1: rf.nn.Conv1d, 2: rf.nn.Conv2d, 3: rf.nn.Conv3d}
FORMATS = [rf.CP, rf.Tucker, rf.TT, rf.TTM, rf.TR]
WAYS = [(False, False), (True, False), (False, True), (True, True)]
SEED = 3


def gradients_match(actual, expected, leaves):
    direction = torch.randn_like(expected)
    close(actual, expected)
    pairs = zip(
        torch.autograd.grad(actual, leaves, direction), torch.autograd.grad(expected, leaves, direction), strict=True
    )
    for ours, theirs in pairs:
        close(ours, theirs)


def pair(format, dims, channels=(4, 6), kernel=3, bias=True, **options):
    """A layer of ours, and torch's of the same options; the kernel of the latter is given at each call."""
    theirs = TORCH[dims](*channels, kernel, bias=bias, dtype=torch.float64, **options)
    weight = make(format, tuple(theirs.weight.shape))
    return OURS[dims].around(weight, theirs), theirs


def check(ours, theirs, x):
    t = ours.weight
    x = x.clone().requires_grad_()
    shared = [] if ours.bias is None else [ours.bias]
    for _ in (ours.train(), ours.eval()):
        kernel = naive_dense(t, drawn(t, SEED))
        parameters = {"weight": kernel} | ({} if ours.bias is None else {"bias": ours.bias})
        expected = torch.func.functional_call(theirs, parameters, (x,))
        torch.manual_seed(SEED)
        gradients_match(ours(x), expected, [x, *t.factors, *(t.log_stds if t.training else []), *shared])


def image(dims, channels=4, size=7, batch=(2,)):
    return torch.randn(*batch, channels, *[size] * dims, dtype=torch.float64)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_it_is_the_convolution_with_the_dense_kernel(kind, dims):
    check(*pair(kind(3), dims), image(dims))
    check(*pair(kind(3), dims, bias=False), image(dims, batch=()))


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_every_way_gives_the_same(kind, dims, way):
    ours, theirs = pair(kind(3), dims, kernel=(3, 2)[:dims], stride=2, padding=1, bias=False)
    t, x = ours.eval().weight, image(dims).requires_grad_()
    if parts_of(t.layout, *way) is None:
        assert kind is rf.TTM
        return
    expected = torch.func.functional_call(theirs, {"weight": naive_dense(t, t.factors)}, (x,))
    gradients_match(convolve_by(t.layout, list(t.factors), x, ours.geometry, way), expected, [x, *t.factors])


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_channels_of_several_modes_and_padding(kind, way):
    modes = {"out_modes": (2, 3), "in_modes": (3, 4)}
    ours, theirs = pair(kind(2, **modes), 2, channels=(11, 6), bias=False)
    t, x = ours.eval().weight, image(2, channels=11)
    assert t.layout.padded_shape[1] == 12
    if parts_of(t.layout, *way) is not None:
        expected = torch.func.functional_call(theirs, {"weight": naive_dense(t, t.factors)}, (x,))
        gradients_match(convolve_by(t.layout, list(t.factors), x, ours.geometry, way), expected, list(t.factors))


@settings(max_examples=40, deadline=None)
@given(
    which=st.sampled_from(FORMATS),
    dims=st.integers(1, 2),
    channels=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    groups=st.integers(1, 2),
    kernel=st.integers(1, 4),
    stride=st.integers(1, 3),
    padding=st.sampled_from([0, 1, 2, "valid", "same"]),
    dilation=st.integers(1, 2),
    mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
    rank=st.integers(1, 4),
)
def test_any_geometry(  # noqa: PLR0913, PLR0917  all that torch takes
    which, dims, channels, groups, kernel, stride, padding, dilation, mode, rank
):
    if padding == "same":
        stride = 1
        kernel += 1 - kernel % 2  # torch warns of even kernels
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "padding_mode": mode}
    channels = (channels[0] * groups, channels[1] * groups)
    check(*pair(which(rank), dims, channels=channels, kernel=kernel, **options), image(dims, channels[0], size=9))


def test_same_padding_of_an_even_kernel_is_longer_behind(kind):
    layer = OURS[1](2, 3, 4, padding="same", format=kind(2), dtype=torch.float64).eval()
    x = image(1, channels=2)
    padded = nn.functional.pad(x, (1, 2))
    close(layer(x), nn.functional.conv1d(padded, layer.weight.dense(), layer.bias))
    assert layer(x).shape == (2, 3, 7)


def test_after_cuts_down_to_zero(kind):
    ours, theirs = pair(kind(3), 2)
    for bond, rank in ours.weight.ranks.items():
        ours.weight.keep_slices_(bond, torch.arange(rank - 1))
    check(ours, theirs, image(2))
    bond = next(iter(ours.weight.ranks))
    ours.weight.keep_slices_(bond, torch.zeros(0, dtype=torch.int64))
    close(ours(image(2)), ours.bias.reshape(1, -1, 1, 1).expand(2, 6, 5, 5))


def test_the_planner_takes_the_maps_that_pay():
    layout = rf.Tucker(8).layout((256, 256, 3, 3))
    small = conv_plan(layout, tuple(dict.fromkeys(layout.bonds, 8).items()), 1, 2**14, 2**14)
    assert (small.maps_in, small.maps_out, small.forms_weight) == (True, True, False)
    assert small.flops * 20 < 2 * 2**14 * math.prod(layout.shape)
    full = conv_plan(layout, (("r1", 256), ("r2", 256), ("r3", 3), ("r4", 3)), 1, 2**14, 2**14)
    assert full.forms_weight
    grouped = conv_plan(rf.Tucker(8).layout((256, 128, 3, 3)), tuple(dict.fromkeys(layout.bonds, 2).items()), 2, 64, 64)
    assert grouped.forms_weight
    matrix = rf.TTM(8).layout((256, 256, 3, 3))
    assert conv_plan(matrix, tuple(dict.fromkeys(matrix.bonds, 2).items()), 1, 2**14, 2**14).forms_weight


def test_the_kernel_is_not_formed_where_maps_pay(monkeypatch):
    layer = OURS[2](128, 128, 3, format=rf.Tucker(4))
    monkeypatch.setattr(_contract, "dense", lambda *_: pytest.fail("formed"))
    assert layer(torch.zeros(8, 128, 16, 16)).shape == (8, 128, 14, 14)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_from_dense_at_full_rank(dims):
    dense = TORCH[dims](4, 6, 3, stride=2, padding=1, dtype=torch.float64)
    for format in (rf.Tucker(100), rf.TT(100), rf.TTM(100)):
        layer = OURS[dims].from_dense(dense, format=format, posterior=rf.Point())
        x = image(dims)
        close(layer(x), dense(x), 1e-8)
        assert layer.bias is dense.bias


def test_tensorize_takes_convolutions(kind):
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5))
    bias = model[0].bias
    rf.tensorize_(model, kind(3))
    assert set(rf.ranks(model)) == {"0", "3"}
    assert model[0].bias is bias
    assert model(torch.randn(2, 3, 4, 4)).shape == (2, 5)
    with pytest.raises(ValueError, match=r"'0' has in_channels=3, but the input has shape \(2, 4, 4, 4\)"):
        model(torch.randn(2, 4, 4, 4))
    fresh = rf.tensorize_(nn.Conv2d(64, 64, 3), rf.Tucker(16))
    std = (2 / (64 * 9)) ** 0.5
    torch.testing.assert_close(fresh.weight.dense().square().mean().sqrt(), torch.tensor(std))


def test_state_and_copies(kind):
    layer = OURS[2](4, 6, 3, format=kind(2)).eval()
    assert all(k == "bias" or k.startswith(("weight.factors.", "weight.log_stds.")) for k in layer.state_dict())
    x = torch.randn(2, 4, 5, 5)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
    other = OURS[2](4, 6, 3, format=kind(4)).eval()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))


def test_autocast_runs(kind):
    layer = OURS[2](4, 6, 3, format=kind(2))
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(torch.randn(2, 4, 5, 5))
    assert y.dtype is torch.bfloat16
    y.float().sum().backward()


def test_repr_says_what_it_is():
    shown = repr(OURS[2](4, 6, 3, padding=1, groups=2, format=rf.CP(2)))
    assert shown.startswith("Conv2d(4, 6, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), groups=2, bias=True, CP,")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"groups": 3}, "in_channels must be divisible by groups"),
        ({"stride": 2, "padding": "same"}, "padding='same' is not supported for strided convolutions"),
        ({"padding": "half"}, "Invalid padding string"),
        ({"padding_mode": "mirror"}, "padding_mode must be one of"),
    ],
    ids=str,
)
def test_options_that_torch_refuses(arguments, text):
    with pytest.raises(ValueError, match=text):
        OURS[2](4, 6, 3, format=rf.TT(2), **arguments)


@pytest.mark.parametrize("shape", [(4,), (2, 3, 8), (1, 2, 4, 8)])
def test_inputs_of_another_shape(shape):
    with pytest.raises(ValueError, match=r"Conv1d has in_channels=4, but the input has shape .*\(batch, 4, length\)"):
        OURS[1](4, 6, 3, format=rf.TT(2))(torch.zeros(shape))
