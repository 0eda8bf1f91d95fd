"""The monitor: rows against numbers by hand, divergence, collapse, the wait for data."""

import itertools
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from plumbing import launch, monitor
from plumbing.checkpoint import read_log
from plumbing.launch import UserError
from plumbing.metrics import feature_std, rankme
from plumbing.monitor import Monitor

TEAM = launch.Team(0, 1, torch.device("cpu"))
NORM = torch.tensor(1.0)


def watch(out, names=("l11", "l12"), end=4, **more):
    args = SimpleNamespace(**(dict(batch=8, micro=4, epochs=2, log_every=2) | more))
    return Monitor(out, names, args, TEAM, 0, end, total=10)


def losses(*values, **more):
    """Terms of a step with two micro-batches."""
    named = dict(zip(("l11", "l12", "loss"), values, strict=True)) | more
    return {name: torch.tensor([value - 0.5, value + 0.5]) for name, value in named.items()}


def pooled(spread=1.0):
    return spread * torch.randn(16, 5, generator=torch.Generator().manual_seed(0))


def test_a_row_holds_the_means_of_its_step_and_the_speed_since_the_last(tmp_path, monkeypatch):
    clock = itertools.count(100, 4)  # seconds; read once when it starts, once per row
    monkeypatch.setattr(monitor.time, "perf_counter", lambda: float(next(clock)))
    with watch(tmp_path) as seen:
        for done in (1, 2):
            seen.update(done, losses(done, 2.0, 3.0), pooled(), NORM, lr=0.25, momentum=0.5)
    [row] = read_log(tmp_path / "log.csv")
    assert {key: float(value) for key, value in row.items()} == pytest.approx(
        {
            "step": 2,
            "epoch": 0.4,  # 10 steps are 2 epochs
            "images": 16,
            "loss": 3,
            "l11": 2,
            "l12": 2,
            "lr": 0.25,
            "momentum": 0.5,
            "feature_std": feature_std(pooled()),
            "rankme": rankme(pooled()),
            "images_per_s": 16 / 4,
            "data_wait": 0,
        },
        rel=1e-5,
    )


def test_health_is_that_of_the_first_films_however_large_the_batch(tmp_path, monkeypatch):
    """Two micro-batches of 4 films: rows 0–3 and 4–7 are the views of films 0–3, and so on."""
    monkeypatch.setattr(monitor, "HEALTH_FILMS", 5)
    with watch(tmp_path) as seen:
        for done in (1, 2):
            seen.update(done, losses(1.0, 1.0, 1.0), pooled(), NORM, 0.1, 0.9)
    [row] = read_log(tmp_path / "log.csv")
    first = pooled()[[0, 1, 2, 3, 8, 4, 5, 6, 7, 12]].double().numpy()
    assert float(row["feature_std"]) == pytest.approx(first.std(0).mean(), rel=1e-4)
    share = np.linalg.svd(first, compute_uv=False)
    share = share / share.sum() + 1e-7
    assert float(row["rankme"]) == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-4)


def test_only_the_lead_computes_health_and_only_from_what_it_needs(tmp_path, monkeypatch):
    """Rank 1 of 4, whose films are the 9th to 16th, sends the first three, and is done."""
    sent = []
    for name in ("mean", "any"):
        monkeypatch.setattr(launch.Team, name, lambda _self, value: value)
    monkeypatch.setattr(
        launch.Team, "gather_objects", lambda _self, rows: sent.append(rows) or [rows]
    )
    monkeypatch.setattr(monitor, "HEALTH_FILMS", 11)
    monkeypatch.setattr(monitor, "rankme", None)
    args = SimpleNamespace(batch=32, micro=4, epochs=2, log_every=1)
    with Monitor(tmp_path, ("l11",), args, launch.Team(1, 4, TEAM.device), 0, 4, 10) as seen:
        seen.update(1, losses(1.0, 1.0, 1.0), pooled(), NORM, 0.1, 0.9)
    assert torch.equal(sent[0], torch.stack([pooled()[:3], pooled()[4:7]], 1))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_leave_a_row_not_a_traceback(tmp_path, value):
    broken = pooled()
    broken[3, 2] = value
    with watch(tmp_path) as seen, warnings.catch_warnings():
        warnings.simplefilter("error")
        for done in (1, 2):
            seen.update(done, losses(1.0, 1.0, 1.0), broken, NORM, 0.1, 0.9)
    [row] = read_log(tmp_path / "log.csv")
    assert (row["feature_std"], row["rankme"]) == ("nan", "nan")


def test_rows_are_written_when_due_and_at_the_end(tmp_path, capsys):
    with watch(tmp_path, end=5) as seen:
        for done in range(1, 6):
            seen.update(done, losses(1.0, 1.0, 1.0), pooled(), NORM, 0.1, 0.9)
    assert [row["step"] for row in read_log(tmp_path / "log.csv")] == ["2", "4", "5"]
    stopped = "stopped at step 5 of 10 by --max_steps; the same command without it resumes. "
    assert capsys.readouterr().out == f"{stopped}What it has learnt so far:\n"


@pytest.mark.parametrize("end, steps", [(10, 10), (5, 3)])
def test_a_run_that_is_over_or_was_told_to_end_was_not_stopped_by_max_steps(
    tmp_path, capsys, end, steps
):
    with watch(tmp_path, end=end) as seen:
        for done in range(1, steps + 1):
            seen.update(done, losses(1.0, 1.0, 1.0), pooled(), NORM, 0.1, 0.9)
    assert not capsys.readouterr().out


def test_the_papers_recipe_is_warned_of_on_a_cpu_alone():
    """By hand: 95,040 films × 300 epochs / 1.1 per second are 300 days of 24 hours."""
    given = SimpleNamespace(warmup=None)
    args = dict(recipe="paper", size="base", epochs=300, warmup=40.0, probe=None, holdout=50)
    args |= dict(weights=None)

    def said(device="cpu", **other):
        team = launch.Team(0, 1, torch.device(device))
        own = SimpleNamespace(**args | other)
        sizes = range(95_096), range(95_040), range(50)
        return monitor.describe_length(given, own, {"warmup": 40.0}, *sizes, 9, team)

    assert "that is up to 7,200.0 hours; --recipe small is for CPUs" in said()
    for others in (dict(device="cuda"), dict(recipe="small"), dict(size="tiny")):
        assert "warning" not in said(**others)
    assert "--weights FILE" in said(recipe="small")
    assert "--weights FILE" not in said() + said(recipe="small", weights="encoder.pt")
    assert "to train on, 50 held out, 6 more of their patients left out; 9 steps" in said()
    assert "50 held out (a tenth of all at most), 6 more" in said(holdout=60)
    assert "50 held out, 6 more" in said(holdout=60, probe="labels.csv")


def test_terms_that_a_step_lacks_stay_empty(tmp_path):
    with watch(tmp_path, names=("l11", "l12", "d11")) as seen:
        for done in (1, 2):
            seen.update(done, losses(1.0, 1.0, 1.0), pooled(), NORM, 0.1, 0.9)
    [row] = read_log(tmp_path / "log.csv")
    assert row["d11"] == "" and row["l11"] == "1"


def test_the_wait_for_data_is_a_share_of_the_time(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(monitor.time, "perf_counter", lambda: now[0])

    def slow_loader():
        for item in (1, 2):
            now[0] += 3.0
            yield item

    with watch(tmp_path) as seen:
        for done, item in enumerate(seen.timed(slow_loader()), 1):
            assert item == done
            now[0] += 1.0
            seen.update(done, losses(1.0, 1.0, 1.0), pooled(), NORM, 0.1, 0.9)
    [row] = read_log(tmp_path / "log.csv")
    assert float(row["data_wait"]) == pytest.approx(0.75)
    assert float(row["images_per_s"]) == pytest.approx(16 / 8)


@pytest.mark.parametrize("what", ["loss", "norm"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_was_not_finite_stops_the_run_when_it_is_next_looked_at(tmp_path, what, value):
    good = losses(1.0, 1.0, 1.0)
    bad = losses(1.0, 1.0, value) if what == "loss" else good
    norm = torch.tensor(value) if what == "norm" else NORM
    with watch(tmp_path) as seen:
        seen.update(1, bad, pooled(), norm, 0.1, 0.9)  # not read here: a GPU would be waited for
        with pytest.raises(UserError, match="NaN or infinite before step 2: .*last.pt") as error:
            seen.update(2, good, pooled(), NORM, 0.1, 0.9)
        with pytest.raises(UserError, match="NaN or infinite"):
            seen.check(2)
    assert "\n" not in str(error.value) and read_log(tmp_path / "log.csv") == []


def test_weights_are_looked_at_before_they_are_saved(tmp_path):
    model = torch.nn.Linear(2, 2)
    with watch(tmp_path) as seen:
        seen.check(1, model)
        with torch.no_grad():
            model.weight[0, 1] = float("nan")
        seen.check(1)
        with pytest.raises(UserError, match="before step 1"):
            seen.check(1, model)
        model.requires_grad_(False)
        seen.check(1, model)  # only trained weights are looked at


def test_a_collapse_is_said_but_not_in_the_first_tenth(tmp_path, capsys):
    same = torch.ones(16, 5)
    with watch(tmp_path, log_every=1) as seen:
        seen.update(1, losses(1.0, 1.0, 1.0), same, NORM, 0.1, 0.9)
        assert "collapse" not in "".join(capsys.readouterr())
        seen.update(2, losses(1.0, 1.0, 1.0), pooled(), NORM, 0.1, 0.9)
        assert "collapse" not in "".join(capsys.readouterr())
        seen.update(3, losses(1.0, 1.0, 1.0), same, NORM, 0.1, 0.9)
        said = "".join(capsys.readouterr())
    assert "warning: step 3: the features collapse (std 0.000, RankMe 1.0)" in said
    assert "python -m lab.health" in said
