"""lab.rcdm: diffusion against closed forms, questions against loops, no learnt film is shown."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import default_collate

import masks
import pretrain
from data import Views, open_films
from lab import common, rcdm
from model import SIZES, CheXWorld
from plumbing import launch, phantom, weights
from plumbing.checkpoint import save_atomic, write_json
from plumbing.keys import torch_generator
from plumbing.splits import hold_out_films

SMALL = (
    "--size 16 --channels 4 --batch 4 --steps 6 --films 2 --samples 2 --ddim 2 --log_every 1 "
    "--device cpu"
).split()


# ------------------------------------------------------------------ diffusion
def test_forward_process_has_the_stated_mean_and_variance_and_v_gives_both_back():
    n, generator = 40_000, torch.Generator().manual_seed(0)
    for t in (0.0, 0.2, 0.5, 0.9, 1.0):
        x, noise = torch.full((n, 1, 1, 1), 0.6), torch.randn(n, 1, 1, 1, generator=generator)
        noisy, v = rcdm.noised(x, torch.full((n,), t), noise)
        signal, spread = np.cos(np.pi * t / 2), np.sin(np.pi * t / 2)
        assert abs(noisy.mean() - signal * 0.6) < 0.02 and abs(noisy.std() - spread) < 0.02
        assert torch.allclose(signal * noisy - spread * v, x, atol=1e-5)
        assert torch.allclose(spread * noisy + signal * v, noise, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 3, 20])
def test_ddim_with_an_all_knowing_network_follows_the_straight_rotation(steps):
    x, noise, visited = torch.rand(5, 1, 4, 4) * 1.8 - 0.9, torch.randn(5, 1, 4, 4), []

    def oracle(noisy, t):
        visited.append((float(t[0]), noisy))
        return rcdm.noised(x, t, noise)[1]

    assert torch.allclose(rcdm.ddim(oracle, noise, steps), x, atol=1e-4)
    assert len(visited) == steps
    for t, noisy in visited:  # closed form of the whole path: cos φ · x + sin φ · ε
        assert torch.allclose(
            noisy, np.cos(np.pi * t / 2) * x + np.sin(np.pi * t / 2) * noise, atol=1e-4
        )


def test_ddim_turns_gaussian_noise_into_gaussian_data():
    mean, std, noise = (
        0.1,
        0.2,
        torch.randn(1000, 1, 1, 1, generator=torch.Generator().manual_seed(1)).clamp(-3.5, 3.5),
    )

    def optimal(noisy, t):  # E[x | x_t] for x ~ N(mean, std²), as the v that implies it
        cos, sin = np.cos(np.pi * float(t[0]) / 2), np.sin(np.pi * float(t[0]) / 2)
        clean = mean + std**2 * cos * (noisy - cos * mean) / (cos**2 * std**2 + sin**2)
        return (cos * noisy - clean) / sin

    assert torch.allclose(
        rcdm.ddim(optimal, noise, 2000), mean + std * noise, atol=0.01
    )  # the probability flow, solved by hand


# ------------------------------------------------------------------ network
def test_conditional_norm_is_batch_norm_with_an_affine_of_each_sample():
    torch.manual_seed(0)
    norm, x, code = (
        rcdm.ConditionalNorm(3),
        torch.randn(6, 3, 5, 5) * 2 + 1,
        torch.randn(6, rcdm.CODE),
    )
    torch.nn.init.normal_(norm.affine.weight, std=0.1)
    affine = (code @ norm.affine.weight.T + norm.affine.bias).detach()
    got = norm(x, code)
    plain = F.batch_norm(x, None, None, training=True)
    for b in range(6):
        for c in range(3):
            assert torch.allclose(
                got[b, c], plain[b, c] * (1 + affine[b, c]) + affine[b, 3 + c], atol=1e-5
            )
    norm.eval()  # painting: statistics of the training, whoever else is in the batch
    assert torch.allclose(norm(x, code)[:2], norm(x[:2], code[:2]), atol=1e-6)
    plain = F.batch_norm(x, norm.norm.running_mean, norm.norm.running_var)
    assert torch.allclose(
        norm(x, code)[4, 2], (plain[4, 2] * (1 + affine[4, 2]) + affine[4, 5]), atol=1e-5
    )


def test_every_residual_block_hears_the_prediction():
    torch.manual_seed(0)
    decoder, x, t = rcdm.Decoder(8, 4).eval(), torch.randn(2, 1, 16, 16), torch.rand(2)
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    blocks = [m for m in decoder.modules() if isinstance(m, rcdm.Residual)]
    inside = {}
    hooks = [
        b.norm2.register_forward_hook(lambda m, i, o, k=k: inside.setdefault(k, []).append(o))
        for k, b in enumerate(blocks)
    ]
    a, b = decoder(x, t, torch.randn(2, 8)), decoder(x, t, torch.randn(2, 8))
    assert a.shape == x.shape and not torch.allclose(a, b)
    assert len(blocks) == 7 and all(not torch.allclose(*pair) for pair in inside.values())
    [h.remove() for h in hooks]


@pytest.mark.slow
def test_the_decoder_learns_to_paint_what_the_condition_says():
    torch.manual_seed(0)
    decoder = rcdm.Decoder(2, 8)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=3e-3)
    ramp = torch.linspace(-0.5, 0.5, 16).expand(16, 16)

    def scene(condition):  # one number says how bright, the other which way it gets darker
        return (
            0.4 * condition[:, 0, None, None]
            + torch.where(condition[:, 1, None, None] > 0, ramp, ramp.T)
        )[:, None].clamp(-1, 1)

    for _ in range(150):
        condition = torch.rand(32, 2) * 2 - 1
        t = torch.rand(32)
        noisy, v = rcdm.noised(scene(condition), t, torch.randn(32, 1, 16, 16))
        optimizer.zero_grad()
        F.mse_loss(decoder(noisy, t, condition), v).backward()
        optimizer.step()
    condition = torch.rand(32, 2) * 2 - 1
    decoder.eval()
    painted = rcdm.ddim(lambda x, t: decoder(x, t, condition), torch.randn(32, 1, 16, 16), 10)
    right, wrong = (
        (painted - scene(c)).square().mean().sqrt().item()
        for c in (condition, condition.roll(1, 0))
    )
    assert right < 0.3 and right < 0.6 * wrong, (right, wrong)  # 0.20 and 0.54 after 250 steps


# ------------------------------------------------------------------ questions to the world model
def test_pool_is_the_mean_over_each_rectangle():
    features = torch.randn(2, 20, 5)
    asked = torch.stack([torch.randperm(36, generator=torch_generator(b))[:20] for b in range(2)])
    rectangles = torch.tensor([[[0, 0, 6, 6], [1, 2, 3, 4]], [[0, 3, 6, 2], [2, 0, 2, 5]]])
    got = rcdm.pool(features, asked, rectangles, 6)
    for b in range(2):
        for r, (top, left, height, width) in enumerate(rectangles[b].tolist()):
            inside = []
            for k, patch in enumerate(asked[b].tolist()):
                row, col = divmod(patch, 6)
                if row in range(top, top + height) and col in range(left, left + width):
                    inside.append(features[b, k])
            assert torch.allclose(got[b, r], torch.stack(inside).mean(0), atol=1e-5)


@pytest.mark.parametrize("grid", [8, 14])
def test_the_mask_is_one_of_pretraining_and_its_rectangles_are_known(grid, monkeypatch):
    covered = []
    smallest_shortfall = masks.smallest_shortfall

    def spy(*args):
        found = smallest_shortfall(*args)
        covered.append(found[0][0].numpy())
        return found

    monkeypatch.setattr(masks, "smallest_shortfall", spy)
    for k in range(50):
        rectangles, keep, masked = rcdm.training_mask(grid, k)
        union = np.zeros((grid, grid), bool)
        for top, left, height, width in rectangles.tolist():
            # 0.15 to 0.2 before the sides are rounded to patches
            assert 0.1 < height * width / grid**2 < 0.26
            union[top : top + height, left : left + width] = True
        assert (union.flatten() == covered[-1]).all()
        expected = masks.sample_masks(1, grid, torch_generator(k))
        assert torch.equal(keep, expected[0][0]) and torch.equal(masked, expected[1][0])
        assert (len(keep), len(masked)) == masks.mask_sizes(grid)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Nine phantoms (six patients) and a random world with 4 × 4 patches."""
    folder = tmp_path_factory.mktemp("rcdm")
    phantom.write_phantoms(folder, 9, size=64, seed=6)
    torch.manual_seed(0)
    world = CheXWorld(32, 8, **SIZES["tiny"])
    save_atomic({"world": world.state_dict(), "config": world.config}, folder / "last.pt")
    names = sorted(path.name for path in (folder / "films").iterdir())
    (folder / "learn.txt").write_text("\n".join(names[:6]))  # patients 0 to 3
    (folder / "show.txt").write_text("\n".join(names[6:]))  # patients 4 and 5
    return folder


def questions_of(folder, mode, size=32):
    args = rcdm.Config(mode=mode, size=24, seed=0)
    return rcdm.Questions(open_films(folder / "films", side=64), size, 4, args, np.arange(9))


def test_crops_are_the_rectangles_of_the_target(folder):
    questions = questions_of(folder, "local", size=240)
    item = questions[0, 3]
    assert (item["context"] == item["target"]).all()
    rectangles = item["rectangles"].tolist()
    for crop, (top, left, height, width) in zip(item["crops"], rectangles, strict=True):
        cut = Image.fromarray(item["target"]).crop(
            (60 * left, 60 * top, 60 * (left + width), 60 * (top + height))
        )
        assert (
            np.abs(
                np.asarray(cut.resize((24, 24), Image.Resampling.BICUBIC)).astype(int) - crop
            ).mean()
            < 3
        )
    assert torch.allclose(item["coords"] @ torch.tensor([4.0, 1.0]), item["asked"].float())
    assert (len(item["keep"]), len(item["asked"])) == masks.mask_sizes(4)
    item = questions_of(folder, "global", size=24)[0, 3]
    assert item["crops"].shape == (1, 24, 24)
    assert (item["crops"][0] == item["target"]).all()
    assert len(item["keep"]) == masks.mask_sizes(4)[0]  # as many as in pre-training
    assert item["asked"].tolist() == list(range(16))
    assert (item["context"] != item["target"]).any()


def test_items_depend_on_epoch_and_film_alone(folder):
    questions = questions_of(folder, "local")
    first, again, later = questions[0, 2], questions_of(folder, "local")[0, 2], questions[1, 2]
    assert all(np.array_equal(first[k], again[k]) for k in first) and not np.array_equal(
        first["context"], later["context"]
    )


@pytest.mark.parametrize("mode", ["local", "global"])
def test_the_wrong_conditions_differ_from_the_right_one(folder, mode):
    questions = questions_of(folder, mode)
    world = weights.load_world(folder / "last.pt").eval()
    item, other = (
        default_collate([ask(i) for i in range(4)])
        for ask in (lambda i: questions[0, i], lambda i: questions.elsewhere(i, i + 1))
    )
    assert torch.equal(item["rectangles"], other["rectangles"]) and torch.equal(
        item["coords"], other["coords"]
    )  # same place
    told, elsewhere = (rcdm.predicted(world, x, "cpu") for x in (item, other))
    assert told.shape == (4, 4 if mode == "local" else 1, 128)
    assert ((told - elsewhere).norm(dim=-1) > 1e-3).all() and (
        (told - told.roll(1, 0)).norm(dim=-1) > 1e-3
    ).all()


def test_local_mode_predicts_as_the_local_loss_does(folder):
    """Over a rectangle, the pooled prediction is the mean of what the loss compares by patch."""
    questions = questions_of(folder, "local")
    world = weights.load_world(folder / "last.pt").eval()
    item = default_collate([questions[0, i] for i in range(3)])
    told = rcdm.predicted(world, item, "cpu")
    asked = []
    world.predictor.proj.register_forward_hook(lambda _, __, answer: asked.append(answer))
    y = item["target"][:, None] / 255
    identity = torch.tensor([1.0, 1, 1, 0]).expand(6, 4)
    keep, masked = (torch.cat([item[name]] * 2) for name in ("keep", "asked"))
    with torch.no_grad():
        world(torch.cat([y, y]), torch.cat([y, y]), keep, masked, torch.zeros(6, 16, 2), identity)
    for b in range(3):
        for r, (top, left, height, width) in enumerate(item["rectangles"][b].tolist()):
            row, col = item["asked"][b] // 4, item["asked"][b] % 4
            inside = (row >= top) & (row < top + height) & (col >= left) & (col < left + width)
            expected = asked[0][b, inside].sum(0) / max(1, inside.sum())
            assert torch.allclose(told[b, r], expected, atol=1e-4)


def test_the_picture_greys_what_the_context_does_not_see():
    view = np.full((160, 160), 7, np.uint8)
    grey = rcdm.shade(view, torch.tensor([0, 5]), 4)
    assert (grey[:40, :40] == 7).all() and (grey[40:80, 40:80] == 7).all()
    assert (grey != 7).sum() == 14 * 40 * 40


def test_the_error_of_the_truth_and_of_something_else(folder):
    questions = questions_of(folder, "local", size=96)
    item = default_collate([questions[0, i] for i in range(3)])
    assert (rcdm.squared_error(item, item["crops"].numpy()) == 0).all()
    worse = rcdm.squared_error(item, 255 - item["crops"].numpy())
    expected = ((255 - 2.0 * item["crops"].numpy()) ** 2).mean((1, 2, 3)) / 255**2
    assert np.allclose(worse, expected)


# ------------------------------------------------------------------ the script
def run(folder, out, *more):
    """main() in this process, as the command line would call it. → result.json"""
    words = ["--weights", folder / "last.pt", "--data", folder / "films"]
    words += ["--learn", folder / "learn.txt", "--show", folder / "show.txt"]
    words += ["--out", out, *SMALL, *more]
    rcdm.main([str(word) for word in words])
    return json.loads((out / "result.json").read_text())


@pytest.mark.slow
def test_a_signal_saves_and_the_same_command_goes_on(folder, tmp_path, monkeypatch):
    def train_step(*words):
        os.kill(os.getpid(), signal.SIGTERM)
        return really_train(*words)

    really_train = rcdm.train_step
    monkeypatch.setattr(rcdm, "train_step", train_step)
    stopped = tmp_path / "stopped"
    whole = tmp_path / "whole"
    with pytest.raises(SystemExit) as end:
        run(folder, stopped, "--mode", "global")
    assert end.value.code == 0
    halfway = torch.load(stopped / "last.pt", weights_only=True)
    assert halfway["step"] == 1
    monkeypatch.undo()
    assert run(folder, stopped, "--mode", "global") == run(folder, whole, "--mode", "global")
    first, second = (torch.load(out / "last.pt", weights_only=True) for out in (whole, stopped))
    for part in ("decoder", "averaged"):
        assert all(torch.equal(v, second[part][k]) for k, v in first[part].items())
        assert any(not torch.equal(v, halfway[part][k]) for k, v in first[part].items())
    for file in ("log.csv", "result.json"):
        assert (whole / file).read_text() == (stopped / file).read_text()
    with pytest.raises(launch.UserError, match="another recipe.*channels 4 → 8"):
        run(folder, whole, "--mode", "global", "--channels", 8)


@pytest.mark.slow
def test_the_command_writes_pictures_and_numbers(folder, tmp_path):
    out = tmp_path / "run"
    words = [sys.executable, "-m", "lab.rcdm", "--weights", folder / "last.pt"]
    words += ["--data", folder / "films", "--out", out, *SMALL]
    words = [str(word) for word in words]
    words += ["--learn", str(folder / "learn.txt")]
    show = ["--show", str(folder / "show.txt")]
    done = subprocess.run([*words, *show], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((out / "result.json").read_text())
    wanted = ["prediction", "other, same place", "shuffled", "target features"]
    assert list(result["paintings"]) == wanted
    for row in result["paintings"].values():
        assert row["pixel_error"]["mean"] > 0
    assert result["paintings"]["prediction"]["prediction_closer_percent"] == 0
    assert result["overlap"].startswith("nobody can tell") and result["overlap"] in done.stdout
    # context, target, 2 samples, 3 others
    assert Image.open(out / "samples.png").width == 8 + 7 * (rcdm.SHOWN + 8)
    assert len((out / "log.csv").read_text().splitlines()) == 7
    with pytest.raises(launch.UserError, match="^0 films to learn from and 0 patients"):
        rcdm.main(words[3:])  # without --show nobody can tell what is new to the world model


@pytest.mark.parametrize(
    "words, says",
    [
        (["--size", "20"], "--size 20: a multiple of 8"),
        (["--films", "1"], "--films 1: at least 2"),
        (["--batch", "99"], "to learn from"),
        (["--weights", "nowhere.pt"], "no such checkpoint"),
    ],
)
def test_mistakes_are_said_in_one_line(folder, tmp_path, words, says):
    with pytest.raises(launch.UserError, match=says) as error:
        run(folder, tmp_path / "x", *words)
    assert "\n" not in str(error.value)


def test_without_a_run_the_user_must_say_where_the_films_are(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(launch.UserError, match="no pre-training run"):
        rcdm.main([])
    with pytest.raises(launch.UserError, match="a folder of films is wanted"):
        rcdm.main(["--weights", str(folder / "last.pt"), "--device", "cpu"])


# ------------------------------------------------------------------ which films are shown
def table_of(folder):
    """{film: (patient, split)} of the phantoms in a folder."""
    lines = (folder / "phantoms.csv").read_text().splitlines()[1:]
    rows = [line.split(",") for line in lines]
    return {row[0]: (row[2], row[3]) for row in rows}


def test_named_films_of_one_patient_are_not_on_both_sides(folder):
    """One table with validation and test films, as the paper divides ChestX-ray14."""
    films = open_films(folder / "films", side=64)
    table = table_of(folder)
    names = [Path(name).name for name in films.names]
    patients = [table[name][0] for name in names]
    wrong = folder / "wrong.csv"  # a patient in val and in test: the pictures keep him
    rows = [f"{name},{patients[i]},{'test' if i < 5 else 'val'}" for i, name in enumerate(names)]
    wrong.write_text("\n".join(["filename,patient_id,split", *rows]) + "\n")
    args = rcdm.Config(learn=str(wrong), show=str(wrong), batch=1)
    learn, shown, words = rcdm.choose_films(films, args, {}, None)
    assert max(shown) < 5 <= min(learn)
    assert not {patients[i] for i in learn} & {patients[i] for i in range(5)}
    assert len({patients[i] for i in shown}) == len(shown)
    assert "nobody can tell" in words
    (folder / "val.txt").write_text("\n".join(names[4:]) + "\n")  # NIH's lists: a name per line
    args = rcdm.Config(learn=str(folder / "val.txt"), batch=1)
    learn, shown, words = rcdm.choose_films(films, args, {"probe": str(wrong)}, (set(), set()))
    assert sorted(learn) == list(range(4, 9)) and ": 0 of 5 to learn from, 0 of " in words
    assert not {patients[i] for i in learn} & {patients[i] for i in shown}


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Sixty phantoms, and a table of their patients alone."""
    folder = tmp_path_factory.mktemp("many")
    phantom.write_phantoms(folder, 60, size=64, seed=8)
    lines = [f"{name},{patient}" for name, (patient, _) in table_of(folder).items()]
    (folder / "patients.csv").write_text("\n".join(["filename,patient_id", *lines]) + "\n")
    return folder


def pretrained(many, folder, **settings):
    """Pre-train for an epoch. → the run's weights, names of the films that it really read"""
    settings = {"seed": 3, "holdout": 5, "workers": 0} | settings
    shape = dict(size="tiny", image=32, patch=8, batch=8, epochs=1, warmup=0.0, device="cpu")
    with reading() as learnt:
        pretrain.main(
            pretrain.Config(data=str(many / "films"), out=str(folder), **shape, **settings)
        )
    assert 10 < len(learnt["Views"]) < 60
    return folder / "last.pt", learnt["Views"]


@pytest.fixture(scope="module")
def runs(many, tmp_path_factory):
    """Two runs on the sixty phantoms: one knows their patients, one a table with test films."""
    folder = tmp_path_factory.mktemp("runs")
    return {
        "patients": pretrained(many, folder / "patients", patients=str(many / "patients.csv")),
        "probe": pretrained(many, folder / "probe", probe=str(many / "phantoms.csv")),
    }


@contextlib.contextmanager
def reading():
    """Write down the films that are read below, by the kind of data set. → {class name: {film}}"""
    read = {}
    real = Views.read

    def spy(self, i):
        read.setdefault(type(self).__name__, set()).add(self.films.names[int(self.subset[i])])
        return real(self, i)

    Views.read = spy
    try:
        yield read
    finally:
        Views.read = real


@pytest.mark.slow
@pytest.mark.parametrize("way", ["patients", "probe", "other list", "moved", "copied and renamed"])
def test_world_decoder_and_pictures_share_no_patient(many, runs, tmp_path, way):
    """The films that pre-training really reads are written down, then those that the decoder reads,
    then those that are shown.
    """
    run_weights, learnt = runs["probe" if way == "probe" else "patients"]
    more = []
    if way == "other list":  # of all films but those of one patient: most were learnt
        films = open_films(many / "films", patients=str(many / "patients.csv"))
        _, held = hold_out_films(films, [], 5, 3)
        others = np.flatnonzero(np.array(films.patients) != films.patients[held[0]])
        (tmp_path / "show.txt").write_text("\n".join(films.names[i] for i in others))
        more = ["--show", str(tmp_path / "show.txt")]
    if way == "moved":
        (tmp_path / "elsewhere").symlink_to(many / "films")
        more = ["--data", str(tmp_path / "elsewhere")]
    if way == "copied and renamed":  # fewer films, in a folder: another hold-out would be drawn
        for film in sorted((many / "films").iterdir()):
            if film.name in sorted(learnt)[:3]:
                continue
            copy = tmp_path / "copy" / "deep" / film.name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(film.read_bytes())
        more = ["--data", str(tmp_path / "copy")]
    out = tmp_path / "rcdm"
    words = ["--weights", str(run_weights), "--out", str(out), *SMALL, "--batch", "1", *more]
    with reading() as read:
        rcdm.main([*words, "--steps", "9"])
    result = json.loads((out / "result.json").read_text())
    rows = table_of(many)

    def patients(names):
        return {rows[Path(name).name][0] for name in names}

    shown = set(result["shown"])
    decoder = read["Questions"] - shown
    assert len(shown) == 2 and decoder
    assert not patients(decoder) & patients(shown)
    assert not patients(decoder | shown) & patients(learnt)
    assert len(patients(shown)) == len(shown)
    seen = re.findall(r"(\d+) of (\d+) to (?:learn from|show)", result["overlap"])
    assert seen == [("0", str(result["learnt_from"])), ("0", "2")]


@pytest.mark.slow
def test_too_few_films_left_out_is_said_and_can_be_overruled(many, runs, tmp_path, capsys):
    run_weights, learnt = runs["patients"]
    words = ["--weights", str(run_weights), "--out", str(tmp_path / "rcdm"), *SMALL]
    words += ["--batch", "16"]
    with pytest.raises(launch.UserError, match="--holdout.*--learn.*--allow_seen") as error:
        rcdm.main(words)
    assert "\n" not in str(error.value)
    rcdm.main([*words, "--allow_seen"])
    result = json.loads((tmp_path / "rcdm" / "result.json").read_text())
    assert not set(result["shown"]) & learnt  # those that it has not seen come first
    assert re.search(r": \d\d of \d\d to learn from, 0 of 2 to show, by name", result["overlap"])
    assert result["overlap"] in capsys.readouterr().out


@pytest.mark.slow
def test_films_of_a_run_whose_list_cannot_be_repeated_are_nobodys(many, tmp_path):
    """A film was deleted since: the hold-out would be another one, and the digest tells."""
    data = tmp_path / "data" / "films"
    data.mkdir(parents=True)
    for film in (many / "films").iterdir():
        (data / film.name).write_bytes(film.read_bytes())
    run_weights, learnt = pretrained(tmp_path / "data", tmp_path / "run")
    names, patients = common.trained_on(run_weights, open_films(data))
    assert names == patients  # without a table every film is a patient of its own
    assert names >= learnt and len(names) < len(learnt) + 8  # the last batch is dropped
    (data / sorted(learnt)[0]).unlink()
    assert common.trained_on(run_weights, open_films(data)) is None
    with pytest.raises(launch.UserError, match="0 films to learn from.*may have been trained on"):
        rcdm.main(["--weights", str(run_weights), "--out", str(tmp_path / "rcdm"), *SMALL])


def test_a_demo_of_an_earlier_version_held_out_the_test_films_of_its_own_table(tmp_path):
    """Its config.json names the drawn films, but not their table."""
    films = tmp_path / "phantoms" / "films"
    write_json(tmp_path / "config.json", {"out": str(tmp_path), "data": str(films), "probe": None})
    table = str(tmp_path / "phantoms" / "phantoms.csv")
    assert common.run_of(tmp_path / "last.pt")["probe"] == table
    elsewhere = {"out": str(tmp_path), "data": "/cxr", "probe": None}
    write_json(tmp_path / "config.json", elsewhere)
    assert common.run_of(tmp_path / "last.pt") == elsewhere
    assert common.run_of(tmp_path / "none" / "last.pt") == {}
