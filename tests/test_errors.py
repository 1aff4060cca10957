# SPDX-License-Identifier: Apache-2.0
"""Every message to the user that no other test module covers: what came, what was expected, the call that mends it."""

import re

import pytest
import torch
from torch import nn

import rankfall as rf

KINDS = (rf.CP, rf.Tucker, rf.TT, rf.TTM, rf.TR)


def layer(format=None):
    return rf.nn.Linear(12, 20, format=format or rf.TTM(3))


def tensor(shape, format):
    return lambda: rf.LowRankTensor(shape, format)


def with_value(value):
    weight = torch.ones(12, 20)
    weight[3, 4] = value
    return weight


CASES = {
    # Sizes of a format
    "rank 0": (lambda: rf.TT(0), ValueError, "TT: max_rank must be 1 or more, got 0. Pass for example TT(8)"),
    "negative rank": (lambda: rf.CP(-3), ValueError, "CP: max_rank must be 1 or more, got -3. Pass for example CP(8)"),
    "one rank of 0": (lambda: rf.TR((2, 0)), ValueError, "TR: max_rank must be 1 or more, got (2, 0)."),
    "rank True": (lambda: rf.TT(True), ValueError, "TT: max_rank must be 1 or more, got True."),
    "rank 2.5": (lambda: rf.TTM(2.5), TypeError, "TTM: max_rank must be an integer, or one integer per bond, got 2.5."),
    "rank as text": (
        lambda: rf.TT("8"),
        TypeError,
        "TT: max_rank must be an integer, or one integer per bond, got '8'.",
    ),
    "no rank": (lambda: rf.TT(None), TypeError, "got None. Pass for example TT(8)"),
    "a mode of 0": (
        lambda: rf.TT(3, in_modes=(0, 5)),
        ValueError,
        "TT: in_modes must be 1 or more, got (0, 5). Pass for example in_modes=(4, 8), or leave it out.",
    ),
    "modes no sequence": (
        lambda: rf.TT(3, out_modes=12),
        TypeError,
        "TT: out_modes must be a sequence of integers, got 12. Pass for example out_modes=(4, 8)",
    ),
    "modes as text": (
        lambda: rf.CP(3, in_modes="ab"),
        TypeError,
        "CP: in_modes must be a sequence of integers, got 'ab'.",
    ),
    # A format on a shape
    "in_modes of another width": (
        lambda: layer(rf.TT(3, in_modes=(3, 5))),
        ValueError,
        "in_modes must multiply to in_features: (3, 5) gives 15, but in_features is 12. "
        "Pass in_modes=(3, 4), or leave it out to let rankfall choose.",
    ),
    "out_modes of another width": (
        lambda: layer(rf.CP(3, out_modes=(4, 4))),
        ValueError,
        "out_modes must multiply to out_features: (4, 4) gives 16, but out_features is 20. Pass out_modes=(4, 5)",
    ),
    "modes of a prime": (
        lambda: rf.nn.Linear(101, 20, format=rf.TT(3, in_modes=(10, 10))),
        ValueError,
        "(10, 10) gives 100, but in_features is 101. Leave it out to let rankfall choose.",
    ),
    "unequal mode counts": (
        lambda: layer(rf.TTM(3, out_modes=(4, 5), in_modes=(3, 2, 2))),
        ValueError,
        "out_modes and in_modes must have the same number of entries, two or more: got (4, 5) and (3, 2, 2). "
        "Pass modes of 1 to fill up the shorter one, or leave one of them out.",
    ),
    "one mode each": (
        lambda: layer(rf.TTM(3, out_modes=(20,), in_modes=(12,))),
        ValueError,
        "the same number of entries, two or more: got (20,) and (12,).",
    ),
    "a chain of one": (
        tensor((12,), rf.TT(3, out_modes=(12,))),
        ValueError,
        "TT needs two modes or more, got ((12,),). Pass out_modes with at least two entries.",
    ),
    "a ring of one": (
        tensor((12,), rf.TR(3, out_modes=(12,))),
        ValueError,
        "TR needs two modes or more, got ((12,),).",
    ),
    "modes of an axis that is not there": (
        tensor((12,), rf.TT(3, in_modes=(3, 4))),
        ValueError,
        "in_modes was given for a tensor of shape (12,), which has no such axis. Leave it out.",
    ),
    "ranks of other bonds": (
        lambda: layer(rf.TT((3, 3), out_modes=(4, 5), in_modes=(3, 4))),
        ValueError,
        "TT: max_rank has 2 entries, but modes ((4, 5), (3, 4)) make 3 bonds r1, r2, r3. "
        "Pass one integer, or one per bond.",
    ),
    "an empty axis": (
        lambda: rf.nn.Linear(0, 20, format=rf.TT(3)),
        ValueError,
        "shape must be one or more sizes of 1 or more, got (20, 0). Pass for example (512, 784).",
    ),
    "no axis": (tensor((), rf.TT(3)), ValueError, "shape must be one or more sizes of 1 or more, got ()."),
    # Construction
    "class for format": (
        lambda: layer(rf.TT),
        TypeError,
        "format must be a rankfall format object, got the class TT. Pass for example rf.TTM(20).",
    ),
    "text for format": (lambda: layer("tt"), TypeError, "format must be a rankfall format object, got 'tt'."),
    "posterior for prior": (
        lambda: rf.LowRankTensor((4, 6), rf.TT(2), prior=rf.MeanField()),
        TypeError,
        "prior must be a rankfall prior object, got MeanField(initial_std=0.01). Pass for example rf.HalfCauchy().",
    ),
    "class for posterior": (
        lambda: rf.LowRankTensor((4, 6), rf.TT(2), posterior=rf.Point),
        TypeError,
        "posterior must be a rankfall posterior object, got the class Point. Pass for example rf.MeanField().",
    ),
    "initial std": (
        lambda: rf.LowRankTensor((4, 6), rf.TT(2), initial_std=-1.0),
        ValueError,
        "initial_std must be positive, got -1.0. Pass None for the default.",
    ),
    "initial share": (
        lambda: rf.LowRankTensor((4, 6), rf.TT(2), initial_share=1.5),
        ValueError,
        "initial_share must be from 0 to 1, got 1.5. 0 shares nothing.",
    ),
    "infinite weight": (
        lambda: rf.LowRankTensor.from_dense(with_value(float("inf")), rf.TT(2)),
        ValueError,
        "weight to decompose holds NaN or infinity. Train or load the dense layer again first.",
    ),
    "NaN weight": (
        lambda: rf.LowRankTensor.from_dense(with_value(float("nan")), rf.CP(2)),
        ValueError,
        "weight to decompose holds NaN or infinity.",
    ),
    # Use
    "input width": (
        lambda: layer()(torch.ones(3, 11)),
        ValueError,
        "a weight of shape (20, 12) has in_features=12, but the input has shape (3, 11). Reshape it to (..., 12).",
    ),
    "transposed input": (
        lambda: layer()(torch.ones(12, 3)),
        ValueError,
        "has in_features=12, but the input has shape (12, 3).",
    ),
    "a number for input": (
        lambda: layer()(torch.ones(())),
        ValueError,
        "has in_features=12, but the input has shape ().",
    ),
    "linear of three axes": (
        lambda: rf.LowRankTensor((4, 5, 6), rf.CP(2)).linear(torch.ones(2, 6)),
        ValueError,
        "linear needs a tensor of two axes, this one has shape (4, 5, 6). Use dense().",
    ),
    "read as a tensor": (
        lambda: nn.functional.linear(torch.ones(2, 12), layer().weight),
        TypeError,
        "torch.linear was given an rf.LowRankTensor. Pass its .dense() or .sample().",
    ),
    "no such bond": (
        lambda: layer(rf.TT(3, out_modes=(4, 5), in_modes=(12,))).weight.keep_slices_("r7", torch.tensor([0])),
        ValueError,
        "no bond 'r7'; this tensor has r1, r2. See .ranks.",
    ),
    # Loss
    "kl of a dense model": (
        lambda: rf.kl(nn.Sequential(nn.Linear(3, 3))),
        ValueError,
        "Sequential has no low-rank tensor, so there is no KL. Call rf.tensorize_(model, rf.TTM(20)) first.",
    ),
    "num_data 0": (
        lambda: rf.ELBOLoss(layer(), num_data=0),
        ValueError,
        "num_data must be positive, got 0. Pass the size of the training set, len(dataset).",
    ),
    "num_data negative": (lambda: rf.ELBOLoss(layer(), num_data=-1), ValueError, "num_data must be positive, got -1."),
    "num_data NaN": (
        lambda: rf.ELBOLoss(layer(), num_data=float("nan")),
        ValueError,
        "num_data must be positive, got nan.",
    ),
    "beta negative": (
        lambda: rf.ELBOLoss(layer(), num_data=9, beta=-0.5),
        ValueError,
        "beta must be 0 or more, got -0.5. 1 is the evidence lower bound.",
    ),
    "nll of many": (
        lambda: rf.ELBOLoss(layer(), num_data=9)(torch.ones(4)),
        ValueError,
        "nll_mean must be one number, got a tensor of shape (4,). Call .mean() on it.",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_message(name):
    call, error, text = CASES[name]
    with pytest.raises(error, match=re.escape(text)):
        call()


@pytest.mark.parametrize("rank", [0, -1, (0,), -(2**40)])
def test_no_format_takes_a_rank_under_one(kind, rank):
    with pytest.raises(ValueError, match=rf"{kind.__name__}: max_rank must be 1 or more, got {re.escape(str(rank))}"):
        kind(rank)


@pytest.mark.parametrize("modes", [(3, 5), (12, 2), (1,), (14,)])
def test_no_format_takes_modes_of_another_width(kind, modes):
    given = modes if kind is not rf.TTM or len(modes) > 1 else (1, *modes)
    with pytest.raises(ValueError, match=r"in_modes must multiply to in_features: .* but in_features is 12"):
        rf.nn.Linear(12, 20, format=kind(2, in_modes=given))


def test_a_refused_cut_leaves_the_tensor_as_it_was():
    t = layer().weight
    before = t.ranks
    with pytest.raises(ValueError, match="no bond 'r0'"):
        t.keep_slices_("r0", torch.tensor([0]))
    assert t.ranks == before
