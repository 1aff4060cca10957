# SPDX-License-Identifier: Apache-2.0
import copy

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import rankfall as rf
from rankfall._files import write_atomic


def dense_model():
    return nn.Sequential(nn.Linear(12, 20), nn.BatchNorm1d(20), nn.Linear(20, 13))


def trained(kind, posterior=None, rank=3):
    """A tensorized model with a cut, and with values that no constructor gives."""
    model = rf.tensorize_(dense_model(), kind(rank), prior=rf.HalfCauchy(0.5), posterior=posterior)
    model(torch.randn(9, 12))
    bond = next(iter(model[0].weight.ranks))
    model[0].weight.keep_slices_(bond, torch.arange(model[0].weight.ranks[bond] - 1))
    return model.eval()


def state_of(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_same_bits(state, other):
    assert state.keys() == other.keys()
    for key, value in state.items():
        assert value.dtype == other[key].dtype
        assert torch.equal(value, other[key]), key


def test_a_saved_model_loads_bit_for_bit(kind, posterior, tmp_path):
    model, path = trained(kind, posterior), tmp_path / "model.safetensors"
    rf.save(model, path)
    x = torch.randn(4, 12)
    for target in (dense_model().eval(), rf.tensorize_(dense_model(), kind(5), posterior=posterior).eval()):
        loaded = rf.load(path, target)
        assert loaded is target
        assert_same_bits(state_of(loaded), state_of(model))
        assert rf.ranks(loaded) == rf.ranks(model)
        assert torch.equal(loaded(x), model(x))
        assert not loaded.training


def test_a_dense_model_takes_format_prior_and_posterior_of_the_file(tmp_path):
    format = rf.TTM((2, 3), out_modes=(5, 2, 2), in_modes=(3, 2, 2))
    model = nn.Sequential(rf.nn.Linear(12, 20, format=format, prior=rf.LogUniform(), posterior=rf.MeanField(0.2)))
    rf.save(model, tmp_path / "m")
    weight = rf.load(tmp_path / "m", nn.Sequential(nn.Linear(12, 20)))[0].weight
    assert (weight.format, weight.prior, weight.posterior) == (format, rf.LogUniform(), rf.MeanField(0.2))


def test_a_table_that_fits_nowhere_loads_from_the_meta_device(tmp_path):
    def made(device):
        return nn.Sequential(nn.Embedding(10_000, 12, device=device), nn.Linear(12, 3))

    model = rf.tensorize_(made("meta"), rf.TTM(2), device="cpu")
    rf.save(model, tmp_path / "m")
    loaded = rf.load(tmp_path / "m", made("meta"))
    assert_same_bits(state_of(loaded), state_of(model))
    ids = torch.randint(10_000, (5,))
    assert torch.equal(loaded.eval()(ids), model.eval()(ids))


def test_what_else_is_on_the_meta_device_is_refused_and_the_model_stays(tmp_path):
    rf.save(rf.tensorize_(dense_model(), rf.TTM(2)), tmp_path / "m")
    model = dense_model().to("meta")
    before = list(model)
    with pytest.raises(ValueError, match=r"^0\.bias is on the meta device, where no value can be loaded to\. Make the"):
        rf.load(tmp_path / "m", model)
    assert list(model) == before


def test_without_a_model_it_is_a_state_dict(kind, tmp_path):
    model = trained(kind)
    rf.save(model, tmp_path / "m")
    state = rf.load(tmp_path / "m")
    assert_same_bits(state, state_of(model))
    other = rf.tensorize_(dense_model(), kind(6))
    other.load_state_dict(state)
    assert rf.ranks(other) == rf.ranks(model)
    assert_same_bits(state_of(other), state_of(model))


def test_plain_torch_save_crosses_ranks_and_training_goes_on(kind, posterior, tmp_path):
    model = trained(kind, posterior)
    torch.save(model.state_dict(), tmp_path / "m.pt")
    other = copy.deepcopy(rf.tensorize_(dense_model(), kind(5), posterior=posterior)).train()
    other.load_state_dict(torch.load(tmp_path / "m.pt", weights_only=True))
    optimizer = torch.optim.Adam(other.parameters())
    (other(torch.randn(8, 12)).square().mean() + rf.kl(other)).backward()
    optimizer.step()
    assert rf.ranks(other) == rf.ranks(model)


def test_a_root_layer_and_a_lone_tensor(tmp_path):
    layer = rf.nn.Linear(12, 20, format=rf.TT(3))
    rf.save(layer, tmp_path / "layer")
    assert_same_bits(state_of(rf.load(tmp_path / "layer", nn.Linear(12, 20))), state_of(layer))
    tensor = rf.LowRankTensor((4, 5, 6), rf.CP(3))
    rf.save(tensor, tmp_path / "tensor")
    same = rf.load(tmp_path / "tensor", rf.LowRankTensor((4, 5, 6), rf.CP(2)))
    assert torch.equal(same.dense(), tensor.dense())


def test_rank_zero_is_saved(tmp_path):
    model = nn.Sequential(rf.nn.Linear(12, 20, format=rf.TT(3)))
    model[0].weight.keep_slices_("r1", torch.empty(0, dtype=torch.int64))
    rf.save(model, tmp_path / "m")
    assert rf.ranks(rf.load(tmp_path / "m", nn.Sequential(nn.Linear(12, 20)))) == rf.ranks(model)


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path):
    def build():
        model = nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Linear(64, 64), "c": nn.Linear(64, 64)})
        model["b"].weight = model["a"].weight
        model["c"].bias = model["a"].bias
        return model

    model = rf.tensorize_(build(), rf.TTM(8))
    rf.save(model, tmp_path / "m")
    stored = 4 * sum(p.numel() for p in model.parameters())
    assert stored < (tmp_path / "m").stat().st_size < stored + 4000
    loaded = rf.load(tmp_path / "m", build())
    assert loaded["a"].weight is loaded["b"].weight
    assert loaded["c"].bias is loaded["a"].bias
    assert_same_bits(state_of(loaded), state_of(model))


def test_a_dense_model_is_saved_too(tmp_path):
    model, other = dense_model(), dense_model()
    rf.save(model, tmp_path / "m")
    assert_same_bits(state_of(rf.load(tmp_path / "m", other)), state_of(model))


def test_saving_leaves_the_model_and_its_random_numbers_alone(tmp_path):
    model = trained(rf.TT)
    before, noise = state_of(model), torch.get_rng_state()
    rf.save(model, str(tmp_path / "m"))
    assert torch.equal(torch.get_rng_state(), noise)
    assert_same_bits(state_of(model), before)


OTHERS = {
    "fewer layers": (
        lambda: nn.Sequential(nn.Linear(12, 20), nn.BatchNorm1d(20)),
        r"is of another architecture than this Sequential: missing nothing; unexpected 2\.bias, .* and \d+ more",
    ),
    "more layers": (
        lambda: nn.Sequential(*dense_model(), nn.Linear(13, 13)),
        r"is of another architecture than this Sequential: missing 3\.bias, 3\.weight; unexpected nothing",
    ),
    "another width of a dense layer": (
        lambda: nn.Sequential(nn.Linear(12, 20), nn.BatchNorm1d(20), nn.Linear(24, 13)),
        r"'2\.weight' is TT.* of shape \(13, 24\) here, .* but .* holds factors .*sizes it was saved with",
    ),
    "another format": (
        lambda: rf.tensorize_(dense_model(), rf.CP(3)),
        r"'0\.weight' is CP.* here, with factors like .* but .* holds factors",
    ),
    "another posterior": (
        lambda: rf.tensorize_(dense_model(), rf.TT(3), posterior=rf.Point()),
        r"another architecture than this Sequential: missing nothing; unexpected 0\.weight\.log_stds\.0",
    ),
    "other modes": (
        lambda: (
            rf.tensorize_(dense_model(), rf.TT(3, out_modes=None, in_modes=None), filter_fn=lambda m, p: p == "0")
            and nn.Sequential(
                rf.nn.Linear(12, 20, format=rf.TT(3, out_modes=(2, 10))),
                nn.BatchNorm1d(20),
                rf.nn.Linear(20, 13, format=rf.TT(3)),
            )
        ),
        r"'0\.weight' is TT.*\(2, 10\).* of shape \(20, 12\) here, .*but .* holds factors",
    ),
    "another batch norm": (
        lambda: nn.Sequential(nn.Linear(12, 20), nn.BatchNorm1d(10), nn.Linear(20, 13)),
        r"'1\.[a-z_]+' has shape \(20,\) in .*, but \(10,\) in this Sequential. Make the model with the sizes",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_architecture_is_refused_and_the_model_stays(name, tmp_path):
    rf.save(trained(rf.TT), tmp_path / "m")
    build, text = OTHERS[name]
    model = build()
    before, modules = state_of(model), [(n, id(m)) for n, m in model.named_modules()]
    parameters = [(n, id(p), p.shape) for n, p in model.named_parameters()]
    with pytest.raises(ValueError, match=text):
        rf.load(tmp_path / "m", model)
    assert [(n, id(m)) for n, m in model.named_modules()] == modules
    assert [(n, id(p), p.shape) for n, p in model.named_parameters()] == parameters
    assert_same_bits(state_of(model), before)


@pytest.mark.parametrize("keep", [0, 4, 100, -1], ids=["empty", "header cut", "header cut later", "one byte short"])
def test_a_truncated_file_is_refused(keep, tmp_path):
    path = tmp_path / "model.safetensors"
    rf.save(trained(rf.TT), path)
    path.write_bytes(path.read_bytes()[:keep])
    model = dense_model()
    before = state_of(model)
    with pytest.raises(
        ValueError, match=r"model.safetensors is damaged or not a safetensors file .*Save the model again"
    ):
        rf.load(path, model)
    assert_same_bits(state_of(model), before)


def test_a_text_file_is_refused(tmp_path):
    (tmp_path / "m").write_text("This is no model, but it is long enough to have a header.")
    with pytest.raises(ValueError, match="is damaged or not a safetensors file"):
        rf.load(tmp_path / "m")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*absent. Pass the path that rf.save wrote"):
        rf.load(tmp_path / "absent", dense_model())
    with pytest.raises(FileNotFoundError, match="no file"):
        rf.load(tmp_path, dense_model())


def test_a_safetensors_file_of_other_origin_is_refused(tmp_path):
    save_file({"weight": torch.ones(2, 2)}, tmp_path / "m")
    with pytest.raises(
        ValueError, match=r"was not written by rf.save. Read it with safetensors and call model.load_st"
    ):
        rf.load(tmp_path / "m")


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*runs to save m in. Make it first"):
        rf.save(dense_model(), tmp_path / "runs" / "m")


class WithNotes(nn.Linear):
    def get_extra_state(self):
        return {"note": 1}


def test_only_tensors_can_be_saved(tmp_path):
    with pytest.raises(TypeError, match=r"'_extra_state' of the state_dict is a dict, and only tensors can be saved"):
        rf.save(WithNotes(2, 2), tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_plain_load_state_dict_still_reports_what_does_not_fit():
    layer = rf.nn.Linear(12, 20, format=rf.TT(3))
    state = {key: value.clone() for key, value in layer.state_dict().items()}
    state["weight.factors.0"] = torch.zeros(7, 3)
    with pytest.raises(RuntimeError, match=r"size mismatch for weight.factors.0"):
        layer.load_state_dict(state)
    del state["weight.factors.0"]
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"weight.factors.0\""):
        layer.load_state_dict(state)


class Killed(BaseException):
    """What ends a process is no Exception."""


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt(), Killed()], ids=repr)
def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(error, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail_half_way(temporary):
        temporary.write_text("ne")
        assert path.read_text() == "old"
        raise error

    with pytest.raises(type(error)):
        write_atomic(path, fail_half_way)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    write_atomic(path, lambda temporary: temporary.write_text("new"))
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_the_written_file_is_readable_like_any_other(tmp_path):
    """Temporary files are often private; one that takes its place should be as open() would have made it."""
    (tmp_path / "plain").write_text("x")
    write_atomic(tmp_path / "atomic", lambda temporary: temporary.write_text("x"))
    rf.save(dense_model(), tmp_path / "model")
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


def test_standard_deviations_that_a_state_lacks_start_afresh_at_its_ranks():
    point, spread = (rf.nn.Linear(12, 20, format=rf.TTM(4), posterior=p) for p in (rf.Point(), rf.MeanField(0.5)))
    point.weight.keep_slices_("r1", torch.tensor([0, 1]))
    spread.load_state_dict(point.state_dict(), strict=False)
    fresh = [rf.MeanField(0.5).initial_log_std(factor) for factor in spread.weight.factors]
    for log_std, wanted in zip(spread.weight.log_stds, fresh, strict=True):
        torch.testing.assert_close(log_std, wanted)
