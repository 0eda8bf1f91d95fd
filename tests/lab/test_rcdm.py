"""lab.rcdm: diffusion against closed forms, questions against loops, no learnt film is shown."""

import json
import os
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

import pretrain
from data import Views, open_films
from lab import rcdm
from masks import mask_sizes
from model import SIZES, CheXWorld
from plumbing import launch, phantom, weights
from plumbing.checkpoint import save_atomic, write_json
from plumbing.keys import torch_generator

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
    features, rectangles = (
        torch.randn(2, 36, 5),
        torch.tensor([[[0, 0, 6, 6], [1, 2, 3, 4]], [[5, 5, 1, 1], [2, 0, 2, 5]]]),
    )
    got = rcdm.pool(features, rectangles)
    for b in range(2):
        for r, (top, left, height, width) in enumerate(rectangles[b].tolist()):
            inside = [
                features[b, 6 * i + j]
                for i in range(top, top + height)
                for j in range(left, left + width)
            ]
            assert torch.allclose(got[b, r], torch.stack(inside).mean(0), atol=1e-5)


@pytest.mark.parametrize("grid", [8, 14])
def test_hidden_rectangles_and_visible_patches(grid):
    for k in range(50):
        rectangles, keep = rcdm.hide(grid, torch_generator(k))
        covered = np.zeros((grid, grid), bool)
        for top, left, height, width in rectangles.tolist():
            assert 0 <= top and top + height <= grid and 0 <= left and left + width <= grid
            assert (
                0.1 < height * width / grid**2 < 0.26
            )  # 0.15 to 0.2 before the sides are rounded to patches
            covered[top : top + height, left : left + width] = True
        assert len(set(keep.tolist())) == len(keep) == mask_sizes(grid)[0]
        assert not covered.flatten()[keep.numpy()].any()  # what is asked for is never seen
        assert (~covered).sum() - len(keep) <= 0.15 * grid**2  # and nearly all else is
    for corner in (0, 1):
        (top, left, height, width), *_ = rcdm.hide(grid, torch_generator(3), corner)[0].tolist()
        assert top == 0 and (left == 0, left + width == grid)[corner]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Nine phantoms (six patients) and a random world with 4 × 4 patches."""
    folder = tmp_path_factory.mktemp("rcdm")
    phantom.write_phantoms(folder, 9, size=64, seed=6)
    torch.manual_seed(0)
    world = CheXWorld(32, 8, **SIZES["tiny"])
    save_atomic({"world": world.state_dict(), "config": world.config}, folder / "last.pt")
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
    item = questions_of(folder, "global", size=24)[0, 3]
    assert (
        item["crops"].shape == (1, 24, 24)
        and (item["crops"][0] == item["target"]).all()
        and item["keep"].tolist() == list(range(16))
    )
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


def test_predictions_see_nothing_of_the_hidden_blocks(folder):
    """The letter lies within the first rectangle: it changes the target, not the prediction."""
    questions, world = questions_of(folder, "local"), weights.load_world(folder / "last.pt").eval()
    for i in range(4):
        film, _ = questions.read(i)
        place = questions.layout(0, i, film.shape, i % 2)
        clean, burnt = (
            default_collate([questions.ask(f, *place)]) for f in (film, rcdm.burn(film, i % 2))
        )
        assert torch.equal(rcdm.predicted(world, clean, "cpu"), rcdm.predicted(world, burnt, "cpu"))
        seen = [
            rcdm.observed(world, x["target"], x["rectangles"], "cpu")[0, 0] for x in (clean, burnt)
        ]
        assert (seen[0] - seen[1]).norm() > 1e-3


def test_strength_of_a_letter():
    clean = np.full((64, 64), 60, np.uint8)
    burnt = rcdm.burn(clean, 0)
    assert rcdm.strength(clean, clean, burnt) == 0 and rcdm.strength(
        burnt, clean, burnt
    ) == pytest.approx(1)
    assert rcdm.strength((clean + 40).astype(np.uint8), clean, burnt) == pytest.approx(
        0, abs=1e-6
    )  # brighter is no letter
    half = (0.5 * clean + 0.5 * burnt).astype(np.uint8)
    assert rcdm.strength(half, clean, burnt) == pytest.approx(0.5, abs=0.02)


def test_distances_of_the_truth_and_of_something_else(folder):
    questions, world = (
        questions_of(folder, "local", size=96),
        CheXWorld(96, 24, **SIZES["tiny"]).eval(),
    )
    item = default_collate([questions[0, i] for i in range(3)])
    pixel, feature = rcdm.distances(world, item, item["crops"].numpy(), 4, "cpu")
    worse, further = rcdm.distances(world, item, 255 - item["crops"].numpy(), 4, "cpu")
    assert (pixel == 0).all() and (feature < 0.2 * further).all() and (worse > 0.01).all()
    expected = ((255 - 2.0 * item["crops"].numpy()) ** 2).mean((1, 2, 3)) / 255**2
    assert np.allclose(worse, expected)


# ------------------------------------------------------------------ the script
def run(folder, out, *more):
    """main() in this process, as the command line would call it. → result.json"""
    words = ["--weights", folder / "last.pt", "--data", folder / "films"]
    words += ["--split", folder / "phantoms.csv", "--out", out, *SMALL, *more]
    rcdm.main([str(word) for word in words])
    return json.loads((out / "result.json").read_text())


@pytest.mark.slow
def test_three_steps_and_three_more_are_six(folder, tmp_path):
    one = tmp_path / "one"
    two = tmp_path / "two"
    result = run(folder, one, "--mode", "global")
    run(folder, two, "--mode", "global", "--max_steps", 3)
    halfway = torch.load(two / "last.pt", weights_only=True)
    assert halfway["step"] == 3
    assert result == run(folder, two, "--mode", "global")
    first, second = (torch.load(out / "last.pt", weights_only=True) for out in (one, two))
    for part in ("decoder", "averaged"):
        assert all(torch.equal(v, second[part][k]) for k, v in first[part].items())
        assert any(not torch.equal(v, halfway[part][k]) for k, v in first[part].items())
    assert (one / "log.csv").read_text() == (two / "log.csv").read_text()
    assert (one / "result.json").read_text() == (two / "result.json").read_text()
    with pytest.raises(launch.UserError, match="another recipe.*channels 4 → 8"):
        run(folder, one, "--mode", "global", "--channels", 8)


@pytest.mark.slow
def test_a_signal_saves_and_the_same_command_goes_on(folder, tmp_path, monkeypatch):
    def train_step(*words):
        os.kill(os.getpid(), signal.SIGTERM)
        return really_train(*words)

    really_train = rcdm.train_step
    monkeypatch.setattr(rcdm, "train_step", train_step)
    with pytest.raises(SystemExit) as end:
        run(folder, tmp_path / "stopped", "--mode", "global")
    assert end.value.code == 0
    assert torch.load(tmp_path / "stopped" / "last.pt", weights_only=True)["step"] == 1
    monkeypatch.undo()
    result = run(folder, tmp_path / "stopped", "--mode", "global")
    assert result == run(folder, tmp_path / "whole", "--mode", "global")


@pytest.mark.slow
def test_the_command_writes_pictures_and_numbers(folder, tmp_path):
    out = tmp_path / "run"
    words = [sys.executable, "-m", "lab.rcdm", "--weights", folder / "last.pt"]
    words += ["--data", folder / "films", "--split", folder / "phantoms.csv", "--out", out, *SMALL]
    words = [str(word) for word in words]
    done = subprocess.run([*words, "--artefacts"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((out / "result.json").read_text())
    wanted = ["prediction", "other, same place", "shuffled", "target features"]
    assert list(result["paintings"]) == wanted
    for row in result["paintings"].values():
        assert row["pixel_error"]["mean"] > 0 and row["feature_distance"]["mean"] > 0
    letters = {"prediction", "features with letter", "features without"}
    assert set(result["artefacts"]["letter_painted"]) == letters
    # context, target, 2 samples, 3 others
    assert Image.open(out / "samples.png").width == 8 + 7 * (rcdm.SHOWN + 8)
    assert Image.open(out / "artefacts.png").width == 8 + 5 * (rcdm.SHOWN + 8)
    assert len((out / "log.csv").read_text().splitlines()) == 7
    words += ["--mode", "global", "--artefacts"]
    again = subprocess.run(words, capture_output=True, text=True)
    assert again.returncode == 1 and again.stderr.startswith("error: --artefacts")
    assert "Traceback" not in again.stderr


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


def test_no_patient_is_both_learnt_from_and_shown(folder):
    films = open_films(folder / "films", side=64)
    args = rcdm.Config(split=str(folder / "phantoms.csv"), batch=1)
    train, shown = rcdm.choose_films(films, args, {})
    table = table_of(folder)
    names = [Path(name).name for name in films.names]
    learnt = {table[names[i]][0] for i in train}
    patients = {table[names[i]][0] for i in shown}
    assert not learnt & patients
    assert {table[names[i]][1] for i in shown} == {"test"}
    assert len(patients) == len(shown)
    assert len(train) + sum(table[name][1] == "test" for name in names) == 9


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Sixty phantoms, a table of their patients alone, and one in which most are test films."""
    folder = tmp_path_factory.mktemp("many")
    phantom.write_phantoms(folder, 60, size=64, seed=8)
    lines = [f"{name},{patient}" for name, (patient, _) in table_of(folder).items()]
    (folder / "patients.csv").write_text("\n".join(["filename,patient_id", *lines]) + "\n")
    patients = sorted({patient for patient, _ in table_of(folder).values()})
    training = set(patients[::4])
    rows = ["filename,label,patient_id,split"]
    for name, (patient, _) in table_of(folder).items():
        rows.append(f"{name},normal,{patient},{'train' if patient in training else 'test'}")
    (folder / "other.csv").write_text("\n".join(rows) + "\n")
    return folder


SHOWN_ONLY = ["--films", "60", "--max_steps", "1"]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["patients", "probe", "patients, other split", "moved"])
def test_no_shown_film_was_learnt_by_the_world_model(many, tmp_path, monkeypatch, way):
    """The films that pre-training really reads are written down, then those that rcdm shows."""
    learnt = set()
    read = Views.read

    def reading(self, i):
        learnt.add(self.films.names[int(self.subset[i])])
        return read(self, i)

    monkeypatch.setattr(Views, "read", reading)
    table = str(many / "phantoms.csv")
    known = {"probe": table} if way == "probe" else {"patients": str(many / "patients.csv")}
    shape = dict(size="tiny", image=32, patch=8, batch=4, epochs=2, warmup=0.0, device="cpu")
    run_folder = tmp_path / "run"
    args = pretrain.Config(
        data=str(many / "films"),
        out=str(run_folder),
        seed=3,
        holdout=5,
        workers=0,
        **shape,
        **known,
    )
    pretrain.main(args)
    assert 20 < len(learnt) < 60
    monkeypatch.undo()

    more = []
    if way == "patients, other split":
        more = ["--split", str(many / "other.csv")]
    if way == "moved":
        (tmp_path / "elsewhere").symlink_to(many / "films")
        more = ["--data", str(tmp_path / "elsewhere")]
    out = tmp_path / "rcdm"
    weights_file = str(run_folder / "last.pt")
    rcdm.main(["--weights", weights_file, "--out", str(out), *SMALL, *SHOWN_ONLY, *more])
    shown = json.loads((out / "result.json").read_text())["shown"]
    rows = table_of(many)
    patients = [rows[Path(name).name][0] for name in shown]
    assert len(shown) >= 2 and not set(shown) & learnt
    assert not set(patients) & {rows[Path(name).name][0] for name in learnt}
    assert len(set(patients)) == len(patients)
    if way in ("patients", "moved"):  # what the draw of seed 3 holds out, and only that
        assert len(shown) <= 5
    if way == "probe":
        assert {rows[Path(name).name][1] for name in shown} == {"test"}


def test_a_demo_of_an_earlier_version_held_out_the_test_films_of_its_own_table(tmp_path):
    """Its config.json names the drawn films, but not their table."""
    films = tmp_path / "phantoms" / "films"
    write_json(tmp_path / "config.json", {"out": str(tmp_path), "data": str(films), "probe": None})
    table = str(tmp_path / "phantoms" / "phantoms.csv")
    assert rcdm.run_of(tmp_path / "last.pt")["probe"] == table
    elsewhere = {"out": str(tmp_path), "data": "/cxr", "probe": None}
    write_json(tmp_path / "config.json", elsewhere)
    assert rcdm.run_of(tmp_path / "last.pt") == elsewhere
    assert rcdm.run_of(tmp_path / "none" / "last.pt") == {}
