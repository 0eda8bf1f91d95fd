"""RCDM: the diffusion against closed forms, the questions to the world model against loops, the real script on phantoms with a random world."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import default_collate

from data import open_films
from lab import rcdm
from model import SIZES, CheXWorld
from plumbing import launch, phantom, weights
from plumbing.checkpoint import save_atomic
from plumbing.keys import torch_generator

SMALL = "--size 16 --channels 4 --batch 4 --steps 6 --films 2 --samples 2 --ddim 2 --log_every 1 --device cpu".split()


# ------------------------------------------------------------------------------------------------ diffusion
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


# ------------------------------------------------------------------------------------------------ network
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


# ------------------------------------------------------------------------------------------------ questions to the world model
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
    from masks import mask_sizes

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


def pairs_of(folder, mode, size=32):
    config = rcdm.Config(mode=mode, size=24, seed=0)
    return rcdm.Pairs(open_films(folder / "films", side=64), size, 4, config, np.arange(9))


def test_crops_are_the_rectangles_of_the_target(folder):
    pairs = pairs_of(folder, "local", size=240)
    item = pairs[0, 3]
    assert (item["context"] == item["target"]).all()
    for crop, (top, left, height, width) in zip(item["crops"], item["rectangles"].tolist()):
        cut = Image.fromarray(item["target"]).crop(
            (60 * left, 60 * top, 60 * (left + width), 60 * (top + height))
        )
        assert (
            np.abs(
                np.asarray(cut.resize((24, 24), Image.Resampling.BICUBIC)).astype(int) - crop
            ).mean()
            < 3
        )
    item = pairs_of(folder, "global", size=24)[0, 3]
    assert (
        item["crops"].shape == (1, 24, 24)
        and (item["crops"][0] == item["target"]).all()
        and item["keep"].tolist() == list(range(16))
    )
    assert (item["context"] != item["target"]).any()


def test_items_depend_on_epoch_and_film_alone(folder):
    pairs = pairs_of(folder, "local")
    first, again, later = pairs[0, 2], pairs_of(folder, "local")[0, 2], pairs[1, 2]
    assert all(np.array_equal(first[k], again[k]) for k in first) and not np.array_equal(
        first["context"], later["context"]
    )


@pytest.mark.parametrize("mode", ["local", "global"])
def test_the_wrong_conditions_differ_from_the_right_one(folder, mode):
    pairs = pairs_of(folder, mode)
    world = weights.load_world(folder / "last.pt").eval()
    item, other = (
        default_collate([ask(i) for i in range(4)])
        for ask in (lambda i: pairs[0, i], lambda i: pairs.elsewhere(i, i + 1))
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
    """The letter lies within the first rectangle, so the prediction is the same with it and without; the target's features are not."""
    pairs, world = pairs_of(folder, "local"), weights.load_world(folder / "last.pt").eval()
    for i in range(4):
        film, _ = pairs.read(i)
        place = pairs.place(0, i, film.shape, i % 2)
        clean, burnt = (
            default_collate([pairs.ask(f, *place)]) for f in (film, rcdm.burn(film, i % 2))
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
    pairs, world = pairs_of(folder, "local", size=96), CheXWorld(96, 24, **SIZES["tiny"]).eval()
    item = default_collate([pairs[0, i] for i in range(3)])
    pixel, feature = rcdm.distances(world, item, item["crops"].numpy(), 4, "cpu")
    worse, further = rcdm.distances(world, item, 255 - item["crops"].numpy(), 4, "cpu")
    assert (pixel == 0).all() and (feature < 0.2 * further).all() and (worse > 0.01).all()
    expected = ((255 - 2.0 * item["crops"].numpy()) ** 2).mean((1, 2, 3)) / 255**2
    assert np.allclose(worse, expected)


# ------------------------------------------------------------------------------------------------ the script
def run(monkeypatch, folder, out, *more):
    """main() in this process, as the command line would call it."""
    words = [
        "--weights",
        folder / "last.pt",
        "--data",
        folder / "films",
        "--split",
        folder / "phantoms.csv",
        "--out",
        out,
        *SMALL,
        *more,
    ]
    monkeypatch.setattr(sys, "argv", ["rcdm.py", *map(str, words)])
    rcdm.main()


def test_three_steps_and_three_more_are_six(folder, tmp_path, monkeypatch):
    run(monkeypatch, folder, tmp_path / "one", "--mode", "global")
    run(monkeypatch, folder, tmp_path / "two", "--mode", "global", "--max_steps", 3)
    halfway = torch.load(tmp_path / "two/last.pt", weights_only=True)
    assert halfway["step"] == 3
    run(monkeypatch, folder, tmp_path / "two", "--mode", "global")
    one, two = (
        torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("one", "two")
    )
    for part in ("decoder", "averaged"):
        assert all(torch.equal(v, two[part][k]) for k, v in one[part].items())
        assert any(not torch.equal(v, halfway[part][k]) for k, v in one[part].items())
    assert [(tmp_path / name / "log.csv").read_text() for name in ("one",)] == [
        (tmp_path / "two/log.csv").read_text()
    ]
    assert (tmp_path / "one/result.json").read_text() == (tmp_path / "two/result.json").read_text()
    with pytest.raises(launch.UserError, match="another recipe.*channels 4 → 8"):
        run(monkeypatch, folder, tmp_path / "one", "--mode", "global", "--channels", 8)


def test_the_command_writes_pictures_and_numbers(folder, tmp_path):
    words = [
        sys.executable,
        "-m",
        "lab.rcdm",
        "--weights",
        folder / "last.pt",
        "--data",
        folder / "films",
        "--split",
        folder / "phantoms.csv",
        "--out",
        tmp_path / "run",
        "--artefacts",
        *SMALL,
    ]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert list(result["paintings"]) == [
        "prediction",
        "other, same place",
        "shuffled",
        "target features",
    ]
    assert all(
        row["pixel_error"]["mean"] > 0 and row["feature_distance"]["mean"] > 0
        for row in result["paintings"].values()
    )
    assert set(result["artefacts"]["letter_painted"]) == {
        "prediction",
        "features with letter",
        "features without",
    }
    assert Image.open(tmp_path / "run/samples.png").width == 8 + 7 * (
        rcdm.SHOWN + 8
    )  # context, target, 2 samples, 3 others
    assert Image.open(tmp_path / "run/artefacts.png").width == 8 + 5 * (rcdm.SHOWN + 8)
    assert len((tmp_path / "run/log.csv").read_text().splitlines()) == 7
    again = subprocess.run(
        [str(w) for w in words if w != "--artefacts"] + ["--mode", "global", "--artefacts"],
        capture_output=True,
        text=True,
    )
    assert (
        again.returncode == 1
        and again.stderr.startswith("error: --artefacts")
        and "Traceback" not in again.stderr
    )


def test_no_patient_is_both_learnt_from_and_shown(folder):
    films = open_films(folder / "films", side=64)
    config = rcdm.Config(split=str(folder / "phantoms.csv"), batch=1)
    train, shown = rcdm.split_films(films, config)
    rows = [line.split(",") for line in (folder / "phantoms.csv").read_text().splitlines()[1:]]
    patient, split = {r[0]: r[2] for r in rows}, {r[0]: r[3] for r in rows}
    names = [Path(name).name for name in films.names]
    assert not {patient[names[i]] for i in train} & {patient[names[i]] for i in shown} and {
        split[names[i]] for i in shown
    } == {"test"}
    assert len({patient[names[i]] for i in shown}) == len(shown)
    assert len(train) + sum(split[n] == "test" for n in names) == 9
