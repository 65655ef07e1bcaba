"""The tour's own machinery, with techniques that train nothing, and the table that is kept of it."""

import os, subprocess, sys
from pathlib import Path

import pytest
import torch
from torch import nn

from guards import FUZZ
from modelzip import tour
from modelzip.data import Data, LeNet5, Split
from modelzip.measure import Report, machine
from modelzip.pack import inspect

KEPT = Path(__file__).parent.parent / "bench/results/tour.json"


def little(**how):
    return LeNet5(channels=[4, 8], hidden=16, **how)


@pytest.fixture
def alone(monkeypatch):
    "No techniques, four digits, and a network that nobody trains."
    few = Split(torch.rand(4, 1, 28, 28), torch.arange(4))
    monkeypatch.setattr(tour, "TECHNIQUES", {})
    monkeypatch.setattr(tour, "_ARCHIVE", {})
    monkeypatch.setattr(tour, "mnist5k", lambda: Data(few, few, few))
    monkeypatch.setattr(tour, "LeNet5", little)
    monkeypatch.setattr(tour, "train", lambda model, *args, **kwargs: model.eval())
    return Data(few, few, few)


def coders(path):
    return {line.coder for line in inspect(path).lines}


def files(folder):
    with pytest.MonkeyPatch.context() as m:
        m.setattr(Report, "to_html", lambda *args, **kwargs: None)  # another test looks at the page
        tour.tour(folder, repeats=2, progress=False)
    return [coders(path) == {"raw"} for path in sorted(folder.glob("*.mz"))]


def test_a_model_that_is_returned_as_it_is_leaves_the_baseline_raw(alone, tmp_path):
    tour.technique("nothing at all")(lambda model, data: model)
    assert files(tmp_path) == [True, False]


def test_how_a_file_is_written_belongs_to_the_name(alone, tmp_path):
    def same(model, data):
        return model

    tour.technique("coded")(same)
    tour.technique("mapped", archive=False)(same)
    assert files(tmp_path) == [True, False, True]


def test_one_model_under_two_names_has_two_files(alone, tmp_path):
    mine = little(seed=3)
    tour.technique("coded")(lambda model, data: mine)
    tour.technique("mapped", archive=False)(lambda model, data: mine)
    assert files(tmp_path) == [True, False, True]


def test_nothing_takes_the_place_of_the_model_itself(alone):
    with pytest.raises(ValueError, match="fp32"):
        tour.technique("fp32")
    with pytest.raises(ValueError, match="archive is 'tight'"):
        tour.technique("a", archive="tight")
    assert not tour.TECHNIQUES
    tour.technique("nothing")(lambda model, data: None)
    with pytest.raises(TypeError, match="technique 'nothing' returned NoneType"):
        tour.compressed(little(), alone, progress=False)


def test_a_technique_that_changes_its_model_changes_no_other_row(alone):
    def zeros(model, data):
        for p in model.parameters():
            nn.init.zeros_(p)
        return model

    tour.technique("zeros")(zeros)
    tour.technique("later")(lambda model, data: model)
    model, kept = LeNet5(), LeNet5().state_dict()
    made = tour.compressed(model, alone, progress=False)
    for name in "fp32", "later":
        assert all(torch.equal(t, kept[n]) for n, t in made[name].state_dict().items()), name
    assert made["fp32"] is model and not any(p.any() for p in made["zeros"].parameters())


def test_some_techniques_by_name(alone, tmp_path):
    for name in "one", "two", "three":
        tour.technique(name)(lambda model, data: model)
    report = tour.tour(tmp_path, repeats=2, progress=False, techniques=("three", "one"))
    assert [r.name for r in report.rows] == ["fp32", "three", "one"]
    assert [p.name for p in sorted(tmp_path.glob("*.mz"))] == ["00-fp32.mz", "01-three.mz", "02-one.mz"]
    assert "LeNet-5 by some techniques" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert [*tour.compressed(little(), alone, progress=False, techniques=["two"])] == ["fp32", "two"]
    for wrong, error, said in (
        (["two", "four"], ValueError, "'four', and there is no technique of that name; there are: one, two, three"),
        (["fp32"], ValueError, "'fp32', and there is no"),
        (["two", "two"], ValueError, "'two', twice"),
        ("two", TypeError, "techniques is 'two'; it may be a list of names"),
        (2, TypeError, "techniques"),
    ):
        with pytest.raises(error, match=said):
            tour.tour(tmp_path / "none", techniques=wrong, progress=False)
    assert not (tmp_path / "none").exists()


def test_the_kept_table_has_every_technique():
    kept = Report.from_json(KEPT.read_text(encoding="utf-8"))
    assert [r.name for r in kept.rows] == ["fp32", *tour.TECHNIQUES], "run bench/tour.py"


@pytest.mark.hypothesis
@pytest.mark.skipif(not FUZZ, reason="trains LeNet-5, as the chapter does, which compares its own run: `make fuzz`")
def test_the_kept_table_is_what_a_run_gives(tmp_path):
    "To the byte, on a machine like the one that it was made on."
    kept = Report.from_json(KEPT.read_text(encoding="utf-8"))
    if any(kept.facts[k] != machine()[k] for k in ("SIMD", "torch")):
        pytest.skip("the table is of another kind of processor, or of another torch: their sums end in other digits")
    names = ["float32, entropy-coded", "8-bit weights, per channel", "4-bit weights, group 64", "binary weights"]
    code = "import sys; from modelzip.tour import tour; print(tour(sys.argv[1], 0, 2, False, sys.argv[2:]).to_json())"
    threads = {"OMP_NUM_THREADS": str(kept.facts["threads"]), "OMP_WAIT_POLICY": "passive"}  # sums depend on how many
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path, *names],
        env=os.environ | threads,
        capture_output=True,
        text=True,
        check=True,
    )
    report = Report.from_json(done.stdout)
    assert [r.name for r in report.rows] == ["fp32", *names]
    for row in report.rows:
        assert (row.bytes, row.accuracy) == (kept[row.name].bytes, kept[row.name].accuracy), row.name


def test_what_techniques_share_is_made_once_and_never_stale(alone, monkeypatch):
    made = []

    @tour._once
    def start(model, data, share=0.5):
        made.append(share)
        model = LeNet5(seed=1)
        return model

    model = LeNet5()
    first, second = start(model, alone), start(model, alone)
    assert len(made) == 1 and first is not second
    nn.init.zeros_(first.fc1.weight)
    assert start(model, alone).fc1.weight.any(), "training what was handed out changes later calls"
    start(model, alone, share=0.25)
    assert made == [0.5, 0.25]
    nn.init.zeros_(model.fc1.weight)  # in place: another model
    start(model, alone, share=0.25)
    assert made == [0.5, 0.25, 0.25]
    for f in tour.pruned, tour._shrunk, tour._student:
        assert f.__wrapped__ and not hasattr(f, "cache_info")
