# SPDX-License-Identifier: Apache-2.0
import copy
import math
import pickle

import pytest
import torch

import laws
import rankfall as rf

SHAPES = [(12, 20), (11, 13), (7, 64), (4, 5, 6), (30,), (1, 1), (1, 64), (2, 2), (3, 100)]


def unfolding(t, left):
    """The tensor over its modes, as a matrix with the modes of the given factors as rows."""
    names = [name for axes in t.layout.axes for name in axes]
    full = laws.naive_padded(t, t.factors).reshape([t.layout.mode_sizes[name] for name in names])
    rows = [k for k, name in enumerate(names) if any(name in t.layout.factors[f] for f in left)]
    columns = [k for k in range(len(names)) if k not in rows]
    height = math.prod(full.shape[k] for k in rows)
    return full.permute(*rows, *columns).reshape(height, -1).detach()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", [rf.TT, rf.TTM, rf.Tucker], ids=lambda k: k.__name__)
def test_every_slice_at_the_start_is_one_that_the_modes_carry(kind, shape):
    """The unfolding at a bond has the rank of the bond: one slice more could not be told from the others."""
    t = laws.make(kind(1000), shape)
    for k, (bond, rank) in enumerate(t.ranks.items()):
        left = [k + 1] if kind is rf.Tucker else range(k + 1)
        assert torch.linalg.matrix_rank(unfolding(t, list(left))).item() == rank, bond


# CP and the ring are found by iteration, which is slow at full rank.
FULL_RANK = [
    *((kind, shape) for kind in (rf.TT, rf.TTM, rf.Tucker) for shape in SHAPES),
    *((kind, shape) for kind in (rf.CP, rf.TR) for shape in SHAPES if math.prod(shape) <= 64),
]


@pytest.mark.parametrize(("kind", "shape"), FULL_RANK, ids=str)
def test_caps_never_stand_in_the_way_of_the_dense_weight(kind, shape):
    """At the capped ranks any weight can be held, so a larger max_rank would be of no use."""
    weight = torch.randn(shape, dtype=torch.float64)
    t = rf.LowRankTensor.from_dense(weight, kind(1000), posterior=rf.Point())
    torch.testing.assert_close(t.dense(), weight, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_caps_of_all_formats(kind, shape):
    t = laws.make(kind(1000), shape)
    sizes = list(t.layout.mode_sizes.values())
    for rank in t.ranks.values():
        assert 1 <= rank <= math.prod(sizes) // max(sizes) or rank <= max(sizes)
        assert rank**2 <= math.prod(sizes) or kind is rf.CP
    assert kind(1).start_ranks(t.layout) == dict.fromkeys(t.ranks, 1)


def test_cap_of_cp_is_the_largest_rank_there_is():
    # A tensor of sizes n1..nd has CP rank at most the product of all sizes but the largest.
    assert rf.LowRankTensor((6, 8), rf.CP(100, out_modes=(2, 3), in_modes=(8,))).ranks == {"r": 6}


def test_a_core_dimension_carries_no_more_than_the_others_together():
    t = rf.LowRankTensor((2, 3, 30), rf.Tucker(100))
    assert t.ranks == {"r1": 2, "r2": 3, "r3": 6}
    t = rf.LowRankTensor((2, 3, 30), rf.Tucker((2, 1, 30)))
    assert t.ranks == {"r1": 2, "r2": 1, "r3": 2}


def test_factors_of_each_format():
    shape, modes = (6, 20), {"out_modes": (2, 3), "in_modes": (4, 5)}
    expected = {
        rf.CP: "o1 r, o2 r, i1 r, i2 r",
        rf.Tucker: "r1 r2 r3 r4, o1 r1, o2 r2, i1 r3, i2 r4",
        rf.TT: "o1 r1, r1 o2 r2, r2 i1 r3, r3 i2",
        rf.TTM: "o1 i1 r1, r1 o2 i2",
        rf.TR: "r0 o1 r1, r1 o2 r2, r2 i1 r3, r3 i2 r0",
    }
    for kind, names in expected.items():
        layout = kind(3, **modes).layout(shape)
        assert ", ".join(" ".join(axes) for axes in layout.factors) == names
        assert layout.modes == ((2, 3), (4, 5))
        assert layout.padded_shape == layout.shape == shape
        assert layout.bonds == tuple(sorted({n for n in names.replace(",", "").split() if n.startswith("r")}))


def test_ranks_may_differ_by_bond():
    layer = rf.nn.Linear(20, 6, format=rf.TT((2, 4, 3), out_modes=(2, 3), in_modes=(4, 5)))
    assert layer.weight.ranks == {"r1": 2, "r2": 4, "r3": 3}
    assert [tuple(f.shape) for f in layer.weight.factors] == [(2, 2), (2, 3, 4), (4, 4, 3), (3, 5)]


def test_formats_are_values():
    assert rf.TT(3) == rf.TT(3) != rf.TT(4)
    assert rf.TT(3) != rf.TTM(3)
    assert hash(rf.TT([2, 3], in_modes=[4, 5])) == hash(rf.TT((2, 3), in_modes=(4, 5)))
    with pytest.raises(AttributeError):
        rf.TT(3).max_rank = 4


def test_layouts_are_values_in_every_process():
    layout = rf.TT(3).layout((12, 20))
    assert hash(layout) == hash(rf.TT(3).layout((12, 20)))
    again = pickle.loads(pickle.dumps(layout))
    assert again == layout != rf.TTM(3).layout((12, 20))
    # What another process has for the hash of a text is not taken over.
    assert b"_hash" not in pickle.dumps(layout)
    assert copy.deepcopy(layout) == layout


def test_factors_may_be_plain_tensors_that_a_wrapper_has_put_in_their_place():
    t = laws.make(rf.TTM(3), (12, 20), posterior=rf.Point())
    wanted = t.dense()
    for name, factor in list(t.factors._parameters.items()):
        del t.factors._parameters[name]
        setattr(t.factors, name, factor.detach())
    assert t.dtype == wanted.dtype
    assert all(map(torch.is_tensor, t.drawn()))
    assert torch.equal(t.dense(), wanted)


def test_fits_is_true_at_any_ranks_and_false_elsewhere(kind):
    t = laws.make(kind(3), (12, 20))
    for rank in (0, 1, 2, 7):
        assert t.fits(t.layout.factor_shapes(dict.fromkeys(t.ranks, rank)))
    shapes = [tuple(f.shape) for f in t.factors]
    assert not t.fits(shapes[:-1])
    assert not t.fits([*shapes, (3,)])
    assert not t.fits([*shapes[:-1], (*shapes[-1], 1)])
    for k, dim in t.layout.places(next(iter(t.ranks)))[1:]:
        torn = [list(s) for s in shapes]
        torn[k][dim] += 1
        assert not t.fits(torn)
    for k, axes in enumerate(t.layout.factors):
        for dim, name in enumerate(axes):
            if name in t.layout.mode_sizes:
                wider = [list(s) for s in shapes]
                wider[k][dim] += 1
                assert not t.fits(wider)


def test_description_names_format_modes_and_ranks():
    layer = rf.nn.Linear(20, 6, format=rf.TTM(2, out_modes=(2, 3), in_modes=(4, 5)))
    assert repr(layer) == "Linear(20, 6, bias=True, TTM, modes=(2 3) x (4 5), ranks={'r1': 2})"
    assert repr(layer.weight) == "LowRankTensor((6, 20), TTM, modes=(2 3) x (4 5), ranks={'r1': 2})"


def test_a_tensor_may_have_any_number_of_axes():
    tensor = rf.LowRankTensor((2,) * 18, rf.TT(2))
    assert tensor.dense().shape == (2,) * 18
