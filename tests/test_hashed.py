# SPDX-License-Identifier: Apache-2.0
"""Tables in fewer rows than ids: hashing, quotient and remainder, none; their budget and their part in a comparison."""

import json
import types
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import rankfall as rf
from criteo_files import click_lines
from rankfall.cli import main
from rankfall.recipes import _clicks, _run, criteo
from rankfall.recipes._hashed import Hashed, LeftOut, QuotientRemainder, mixed
from rankfall.recipes._options import TrainOptions
from rankfall.recipes._prepare import PrepareOptions, prepare
from rankfall.recipes._recommender import WIDTH, Recommender

SIZES = (5, 1200, 17, 300_000, *[3] * 22)
SAVINGS = ["drop-table", "hashing", "quotient-remainder"]
METHODS = ["dense", *SAVINGS, "fixed", "compress", "shrinkage", "evidence"]


@pytest.fixture
def _small_tables(monkeypatch):
    """Made-up rows of small tables in place of the full size."""
    monkeypatch.setattr(criteo, "KAGGLE_SIZES", SIZES)
    monkeypatch.setattr(criteo, "Truth", partial(_clicks.Truth, SIZES))
    criteo._made_up.cache_clear()
    yield
    criteo._made_up.cache_clear()


@pytest.fixture
def rows(tmp_path, monkeypatch) -> Path:
    """A folder of prepared rows, from an empty working directory."""
    monkeypatch.chdir(tmp_path)
    Path("train.txt").write_text("\n".join(click_lines(200)))
    prepare(PrepareOptions("criteo", (Path("train.txt"),), Path("rows")), progress=False)
    return Path("rows")


def of_method(method: str, **options) -> nn.Module:
    network = criteo.RECIPE.network(None)
    return _run.build_model(
        network, TrainOptions("criteo", synthetic=True, method=method, **{"max_rank": 2, **options})
    )


def test_the_hash_is_murmurs_and_spreads():
    ids = torch.arange(200_000, dtype=torch.int32)
    found = mixed(ids)
    assert found[1:3].tolist() == [0x514E28B7, 0x30F4C306]  # The published function of 1 and 2.
    assert len(found.unique()) == len(ids)
    assert 0 <= int(found.min()) <= int(found.max()) < 2**32
    counts = torch.bincount(found % 100, minlength=100).double()
    assert float(((counts - 2000) ** 2 / 2000).sum()) < 150  # Chi-squared with 99 degrees of freedom.


def test_a_hashed_table_gives_the_row_of_the_hash():
    table, ids = Hashed(7), torch.tensor([0, 3, 10_131_226], dtype=torch.int32)
    assert torch.equal(table(ids), table.table.weight[mixed(ids) % 7])


def test_quotient_and_remainder_tell_every_id():
    table, ids = QuotientRemainder(30, 11), torch.arange(30, dtype=torch.int32)
    assert table.pairs == 30
    vectors = table(ids)
    expected = table.quotients.weight[ids.long() // 6] * table.remainders.weight[ids.long() % 6]
    assert torch.equal(vectors, expected)
    assert len(vectors.unique(dim=0)) == 30


def test_fewer_pairs_than_ids_are_hashed_to():
    table, ids = QuotientRemainder(1000, 11), torch.arange(1000, dtype=torch.int32)
    places = mixed(ids) % 30
    assert torch.equal(table(ids), table.quotients.weight[places // 6] * table.remainders.weight[places % 6])
    assert len(table(ids).unique(dim=0)) == 30


def test_a_table_that_is_left_out_says_nothing():
    assert torch.equal(LeftOut()(torch.tensor([1, 2], dtype=torch.int32)), torch.zeros(2, WIDTH))


@pytest.mark.usefixtures("_small_tables")
@pytest.mark.parametrize("method", SAVINGS)
@pytest.mark.parametrize("budget", [20_000, 60_000, 300_000, 10**9])
def test_a_budget_is_kept_and_used(method, budget):
    model = of_method(method, budget=budget)
    found = rf.summary(model).parameters
    held = [sum(p.shape[0] for p in table.parameters()) for table in model.tables]
    assert found <= budget
    whole = [isinstance(table, nn.Embedding) for table in model.tables]
    assert all(rows == size for rows, size, is_whole in zip(held, SIZES, whole, strict=True) if is_whole)
    if budget == 10**9:
        assert all(whole)
        return
    assert not all(whole)
    # Small tables are kept first, and one more row for each that is not would be too much.
    assert max(s for s, w in zip(SIZES, whole, strict=True) if w) < min(
        s for s, w in zip(SIZES, whole, strict=True) if not w
    )
    spare = (budget - found) // WIDTH
    if method == "drop-table":
        assert spare < min(s for s, w in zip(SIZES, whole, strict=True) if not w)
    elif method == "hashing" or budget < 100_000:
        assert spare < whole.count(False)


@pytest.mark.usefixtures("_small_tables")
def test_two_tables_take_no_more_than_tell_all_ids():
    tables = of_method("quotient-remainder", budget=400_000).tables
    assert isinstance(tables[1], nn.Embedding)
    assert tables[3].pairs >= 300_000
    assert not tables[3].is_hashed
    assert tables[3].quotients.num_embeddings + tables[3].remainders.num_embeddings == 548 + 548


@pytest.mark.usefixtures("_small_tables")
@pytest.mark.parametrize("method", SAVINGS)
def test_methods_differ_in_their_tables_alone(method):
    fixed, model = of_method("fixed", max_rank=4), of_method(method, max_rank=4)
    size = rf.summary(fixed).parameters
    assert rf.summary(model).parameters <= size
    beside = {path: held for path, held in rf.ranks(fixed).items() if not path.startswith("tables.")}
    assert rf.ranks(model) == beside
    assert len(beside) == 7
    inputs = _clicks.draw(5, SIZES, torch.Generator().manual_seed(0))
    assert model(inputs).shape == (5, 2)


@pytest.mark.usefixtures("_small_tables")
@pytest.mark.parametrize(
    ("method", "text"),
    [
        ("hashing", r"a budget of 5,000 parameters is too small for hashing: apart from the tables the model has "
                    r"3,521, and 26 tables of at least 1 x 128 have 3,328. Pass a larger --budget or a lower"),
        ("quotient-remainder", r"too small for quotient-remainder: .* 26 tables of at least 2 x 128 have 6,656"),
    ],
)  # fmt: skip
def test_a_budget_that_bears_no_tables(method, text):
    model = Recommender(SIZES)
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=text.replace("3,521", r"[\d,]+")):
        of_method(method, budget=5_000)
    with pytest.raises(ValueError, match="is too small for"):
        criteo.RECIPE.network(None).baselines[method](model, 5_000)
    assert dict(model.named_modules()) == before


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("mnist --method hashing",
         "--method hashing is for the tables of criteo, and mnist has none. "
         "Pass evidence, shrinkage, fixed, compress or dense."),
        ("digits --method quotient-remainder", "--method quotient-remainder is for the tables of criteo, and digits"),
        ("digits --method drop-table", "--method drop-table is for the tables of criteo, and digits has none."),
        ("criteo --budget 1000",
         "--budget is for --method hashing, quotient-remainder and drop-table, not evidence. Leave it out."),
        ("criteo --method hashing --budget 0", "--budget must be 1 parameter or more, got 0."),
    ],
)  # fmt: skip
def test_methods_and_budgets_in_the_wrong_place(tmp_path, monkeypatch, capsys, arguments, text):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["train", *arguments.split()])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert text in lines[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", SAVINGS)
def test_a_run_counts_against_the_dense_network(rows, capsys, method):
    main(f"train criteo --data-dir rows --method {method} --epochs 1 --max-rank 2 --budget 12000 --out run".split())
    metrics = json.loads(Path("run/metrics.json").read_text())
    sizes = json.loads((rows / "criteo.json").read_text())["sizes"]
    assert metrics["parameters"] <= 12_000
    assert metrics["dense_parameters"] == sum(p.numel() for p in Recommender(sizes).parameters())
    assert metrics["compression"] == pytest.approx(metrics["dense_parameters"] / metrics["parameters"])
    assert metrics["method"] == method
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["test", "AUC", f"{metrics['test_auc']:.4f}"] in printed
    assert ["normalised", "entropy", f"{metrics['test_normalised_entropy']:.4f}"] in printed
    network = criteo.RECIPE.network(None, rows)
    built = _run.build_model(network, TrainOptions("criteo", rows, method=method, max_rank=2, budget=12_000))
    assert rf.summary(rf.load("run/model.safetensors", built)).parameters == metrics["parameters"]


def compared(capsys, arguments: str) -> tuple[dict, list[str]]:
    main(f"compare criteo {arguments} --epochs 2 --max-rank 2 --out all".split())
    printed = capsys.readouterr().out.splitlines()
    first = next(k for k, line in enumerate(printed) if line.startswith("method"))
    return json.loads(Path("all/compare.json").read_text()), printed[first:]


def test_a_comparison_of_clicks(rows, capsys):
    content, printed = compared(capsys, f"--data-dir {rows} --seeds 0 1 --budget 20000")
    found = {row["method"]: row for row in content["rows"]}
    assert list(found) == METHODS
    assert [line.split()[0] for line in printed[1:9]] == METHODS
    for head in ("log-loss", "AUC", "normalised entropy", "accuracy", "parameters"):
        assert head in printed[0]
    for row, line in zip(content["rows"], printed[1:9], strict=True):
        area = row["test_auc"]
        assert area["error"] == pytest.approx(area["std"] / 2**0.5)
        assert f"{area['mean']:.4f} ± {area['error']:.4f}" in line
    assert printed[9] == "±: standard error of the mean over 2 seeds"
    assert content["known"] == {}
    for name in SAVINGS:
        assert max(found[name]["parameters"]["values"]) <= 20_000
        assert found[name]["max_rank"] == found["fixed"]["max_rank"]


@pytest.mark.usefixtures("_small_tables")
def test_what_does_not_fit_has_its_reason_in_the_table(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_run.psutil, "virtual_memory", lambda: types.SimpleNamespace(available=10**8))
    content, printed = compared(capsys, "--synthetic --limit 300 --seeds 0 --budget 5000")
    reasons = {row["method"]: row["reason"] for row in content["rows"] if "reason" in row}
    assert list(reasons) == ["dense", "hashing", "quotient-remainder", "compress"]
    assert reasons["dense"].startswith("the dense network needs 0.6 GB with gradients and Adam's moments, and 0.1 GB")
    assert reasons["dense"] == reasons["compress"]
    assert "a budget of 5,000 parameters is too small for hashing" in reasons["hashing"]
    assert printed[1].split() == ["dense", *"-" * 10]
    assert f"dense: not trained, for {reasons['dense']}" in printed
    assert not Path("all/dense-seed0").exists()
    assert printed[9].split()[:2] == ["the", "truth"]
    known = content["known"]
    assert printed[9].split()[2:] == [
        f"{known['truth_nll']:.4f}", f"{known['truth_auc']:.4f}",
        f"{known['truth_normalised_entropy']:.4f}", f"{known['truth_accuracy']:.2%}",
    ]  # fmt: skip
    assert 0.7 < known["truth_auc"] <= 1


def test_a_comparison_has_a_budget_of_one_or_more(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["compare", "criteo", "--synthetic", "--budget", "0"])
    assert "--budget must be 1 parameter or more, got 0." in capsys.readouterr().err
