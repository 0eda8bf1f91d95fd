"""The real script, run as a user runs it, and its parts.

Ranks, micro-batches, workers, crashes and bad input change nothing but what they must.
"""

import csv
import dataclasses
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import augment
import pretrain
from lab import bench
from lab.ablation import AblatedCheXWorld
from lab.common import load_predictions
from model import SIZES, CheXWorld
from plumbing import checkpoint, launch, phantom
from plumbing.keys import STEP, torch_generator
from plumbing.launch import UserError
from plumbing.weights import load_encoder, load_world

SMALL = (
    "--size tiny --image 32 --patch 8 --batch 8 --epochs 2 --warmup 0.5 --lr 2e-4 --ema 0.9 "
    "--log_every 1 --save_every 1000 --device cpu --precision float32 --holdout 4"
).split()
LOSSES = ("l11", "l22", "l12", "l21")
COLUMNS = (
    "step,epoch,images,loss,l11,l22,l12,l21,lr,momentum,feature_std,rankme,images_per_s,data_wait"
).split(",")
CPU = torch.device("cpu")
ALONE = launch.Team(0, 1, CPU)


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    folder = tmp_path_factory.mktemp("films")
    phantom.write_phantoms(folder, 36, size=64, seed=5)
    return folder / "films"


def command(data, out, *more, ranks=1):
    words = [sys.executable]
    if ranks > 1:
        port = str(29500 + os.getpid() % 500)
        words += ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
        words += ["--master_port", port]
    script = str(ROOT / "pretrain.py")
    return [*words, script, "--data", str(data), "--out", str(out), *SMALL, *more]


def run(*args, ok=True, **kwargs):
    done = subprocess.run(command(*args, **kwargs), capture_output=True, text=True)
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done


def weights(out):
    return torch.load(out / "last.pt", weights_only=True)["world"]


def log(out):
    return list(csv.DictReader(open(out / "log.csv")))


def largest_difference(a, b):
    return max((x.float() - b[k].float()).abs().max().item() for k, x in a.items())


@pytest.fixture(scope="module")
def reference(films, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "one"
    run(films, out)
    return out


# ---- What a run writes
@pytest.mark.slow
def test_writes_everything_the_contract_names(reference):
    written = {path.name for path in reference.iterdir()}
    tables = {"config.json", "log.csv", "result.json"}
    assert tables | {"last.pt", "encoder.pt", "curve.png", "views.png"} <= written
    rows = log(reference)
    # 36 - 3 held-out films: 4 steps per epoch, 2 epochs
    assert [int(row["step"]) for row in rows] == list(range(1, 9))
    assert list(rows[0]) == COLUMNS
    for row in rows:
        mean = np.mean([float(row[name]) for name in LOSSES])
        assert float(row["loss"]) == pytest.approx(mean, rel=1e-4)
    result = json.loads((reference / "result.json").read_text())
    assert result["domain"]["random"]["recall@1"] == pytest.approx(100 / 64)
    assert Image.open(reference / "views.png").size[0] > 300


# ---- Ranks, micro-batches and workers change nothing
@pytest.mark.slow
def test_two_ranks_equal_one_process(films, reference, tmp_path):
    run(films, tmp_path / "two", ranks=2)
    assert largest_difference(weights(reference), weights(tmp_path / "two")) < 1e-5
    for a, b in zip(log(reference), log(tmp_path / "two"), strict=True):
        for key in ("loss", *LOSSES, "feature_std", "rankme"):
            assert float(a[key]) == pytest.approx(float(b[key]), rel=1e-4), key


@pytest.mark.slow
def test_two_ranks_with_accumulation_and_micro_batches(films, reference, tmp_path):
    run(films, tmp_path / "accumulated", "--micro", "2", ranks=2)
    assert largest_difference(weights(reference), weights(tmp_path / "accumulated")) < 1e-5


@pytest.mark.slow
def test_worker_count_changes_nothing(films, reference, tmp_path):
    run(films, tmp_path / "workers", "--workers", "2")
    assert largest_difference(weights(reference), weights(tmp_path / "workers")) == 0


# ---- Runs that are resumed
@pytest.mark.slow
def test_three_steps_and_the_rest_equal_all_at_once(films, reference, tmp_path):
    said = run(films, tmp_path / "parts", "--max_steps", "3").stdout
    stopped = "stopped at step 3 of 8 by --max_steps; the same command without it resumes. "
    assert f"{stopped}What it has learnt so far:\n" in said
    assert said.endswith("CUT at step 3 of 8: these numbers are of an unfinished training\n")
    said = run(films, tmp_path / "parts").stdout
    assert "resuming at step 3" in said and "stopped at step" not in said
    assert largest_difference(weights(reference), weights(tmp_path / "parts")) == 0
    steps = [row["step"] for row in log(reference)]
    assert [row["step"] for row in log(tmp_path / "parts")] == steps


def started(films, out, steps, *more):
    """The script in the background, once its log holds `steps` rows."""
    process = subprocess.Popen(
        command(films, out, *more), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    path = out / "log.csv"
    while not path.is_file() or len(path.read_text().splitlines()) <= steps:
        assert process.poll() is None, "the run ended before it could be interrupted"
        time.sleep(0.01)
    return process


def rows_without_speed(out):
    speed = ("images_per_s", "data_wait")
    return [{k: v for k, v in row.items() if k not in speed} for row in log(out)]


@pytest.mark.slow
def test_kill_nine_and_the_same_command_again(films, tmp_path):
    more = ("--save_every", "2", "--epochs", "10")  # 40 steps; killed somewhere after the fifth
    run(films, tmp_path / "whole", *more)
    process = started(films, tmp_path / "killed", 5, *more)
    process.kill()
    process.wait()
    run(films, tmp_path / "killed", *more)
    assert largest_difference(weights(tmp_path / "whole"), weights(tmp_path / "killed")) == 0
    same = rows_without_speed(tmp_path / "whole")
    assert same == rows_without_speed(tmp_path / "killed")
    assert len(same) == 40


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_goes_on(films, tmp_path):
    more = ("--epochs", "30")
    process = started(films, tmp_path / "run", 3, *more)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate()
    assert process.returncode == 0 and "SIGTERM: saved at step" in said
    step = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["step"]
    assert 3 <= step < 120
    again = run(films, tmp_path / "run", *more, "--max_steps", str(step + 2))
    assert f"resuming at step {step}" in again.stdout


# ---- Another model in the same loop
# ---- The pixel baseline
@pytest.mark.slow
def test_pixels_and_half_of_the_other_view_on_two_ranks_and_in_two_parts(films, tmp_path):
    """Also: the loss falls, and the domain test, which asks for features, is left out."""
    flags = ["--pixels", "1", "--global_share", "0.5", "--lr", "3e-3"]
    said = run(films, tmp_path / "one", *flags).stdout
    assert "no domain sensitivity test" in said
    rows = log(tmp_path / "one")
    assert list(rows[0]) == [*COLUMNS[:8], "pixels", *COLUMNS[8:]]
    assert all(row["loss"] == row["pixels"] and float(row["l11"]) > 0 for row in rows)
    assert float(rows[-1]["loss"]) < 0.9 * float(rows[0]["loss"])
    result = json.loads((tmp_path / "one" / "result.json").read_text())
    result.pop("made_with")
    assert result.pop("step") == int(rows[-1]["step"])
    assert result == {"domain": {}, "probe": {}, "probe_intervals": {}}

    run(films, tmp_path / "two", *flags, "--micro", "2", ranks=2)
    assert largest_difference(weights(tmp_path / "one"), weights(tmp_path / "two")) < 1e-4

    run(films, tmp_path / "parts", *flags, "--max_steps", "3")
    run(films, tmp_path / "parts", *flags)
    assert largest_difference(weights(tmp_path / "one"), weights(tmp_path / "parts")) == 0
    assert [row["pixels"] for row in log(tmp_path / "parts")] == [row["pixels"] for row in rows]
    other = run(films, tmp_path / "parts", "--lr", "3e-3", ok=False)
    refused(other, "another recipe", "pixels 1.0 → not given", "global_share 0.5 → not given")

    path = tmp_path / "one" / "last.pt"
    assert load_world(path).pixel_weight == 1 and load_encoder(path).dim == 128
    with pytest.raises(UserError, match="--pixels 1.*lab.features"):
        load_predictions(path)


def test_a_run_of_the_paper_knows_nothing_of_newer_settings():
    """Its recipe is what it was before there were these flags, so that old runs resume."""
    args = pretrain.fill_in(pretrain.Config(data="x"), "paper")
    newer = {"pixels": 0.5, "global_share": 0.5}
    assert not newer.keys() & pretrain.fingerprint_of(args, ["a.png"]).keys()
    args = dataclasses.replace(args, **newer)
    assert newer.items() <= pretrain.fingerprint_of(args, ["a.png"]).items()


@pytest.mark.slow
def test_half_of_both_is_a_world_for_every_analysis(films, tmp_path):
    run(films, tmp_path / "half", "--pixels", "0.5", "--max_steps", "2")
    world = load_predictions(tmp_path / "half" / "last.pt")
    images = torch.rand(2, 1, 32, 32)
    assert world.pixel_weight == 0.5 and world.predict(images).shape == (2, 16, 128)
    result = json.loads((tmp_path / "half" / "result.json").read_text())
    assert result["domain"]["candidates"] == 64


def small_config(data, out, **more):
    return dataclasses.replace(
        launch.parse(pretrain.Config, "", SMALL), data=str(data), out=str(out), **more
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "switch, terms",
    [
        (dict(tasks="local"), {"l11", "l22"}),
        (dict(tasks="global,domain", delta=False), {"l12", "l21"}),
        (dict(unified=False), {"l11", "l22", "l12", "l21", "d11", "d22"}),
        (dict(action=False, precision="bfloat16"), {"l11", "l22", "l12", "l21"}),
    ],
)
def test_ablated_models_train(films, tmp_path, switch, terms):
    switch = dict(switch)
    more = {"precision": switch.pop("precision")} if "precision" in switch else {}
    before = signal.getsignal(signal.SIGTERM)
    Model = functools.partial(AblatedCheXWorld, **switch)
    pretrain.main(small_config(films, tmp_path / "run", max_steps=2, **more), Model)
    signal.signal(signal.SIGTERM, before)
    row = log(tmp_path / "run")[-1]
    assert {k for k in row if re.fullmatch(r"[ld]\d\d", k) and row[k]} == terms
    assert 0 < float(row["loss"]) < 3


# ---- Errors
def refused(done, *words):
    assert done.returncode != 0 and "Traceback" not in done.stderr, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert done.stderr.strip().splitlines()[-1] == errors[0], done.stderr
    assert all(word in errors[0] for word in words), done.stderr


@pytest.mark.slow
def test_bad_input_is_one_clear_line(films, reference, tmp_path):
    (tmp_path / "empty").mkdir()
    out = tmp_path / "o"
    none = str(tmp_path / "none.csv")
    refused(run(tmp_path / "nowhere", out, ok=False), "nowhere")
    refused(run(tmp_path / "empty", out, ok=False), "empty")
    refused(run(films, out, "--lrr", "1", ok=False), "--lrr", "did you mean --lr?")
    refused(run(films, out, "--patch", "7", ok=False), "--patch 7")
    refused(run(films, out, "--batch", "4096", ok=False), "4096")
    refused(run(films, out, "--probe", none, ok=False), "none.csv")
    other = run(films, reference, "--lr", "5e-4", ok=False)
    refused(other, "another recipe", "lr 0.0002 → 0.0005")


class Evil:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.slow
def test_junk_and_malicious_checkpoints_run_nothing(films, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "last.pt").write_bytes(b"junk" * 100)
    refused(run(films, out, ok=False), "last.pt")
    torch.save({"world": Evil(tmp_path / "hacked")}, out / "last.pt")
    refused(run(films, out, ok=False), "last.pt")
    assert not (tmp_path / "hacked").exists()


@pytest.mark.slow
def test_one_bad_film_is_named_and_skipped_many_stop(tmp_path):
    films = tmp_path / "films"
    films.mkdir()
    rng = np.random.default_rng(0)
    for i in range(128):
        Image.fromarray(rng.integers(0, 255, (40, 40), np.uint8)).save(films / f"film{i:03d}.png")
    (films / "film007.png").write_bytes(b"")
    more = ("--epochs", "1", "--holdout", "0")
    said = run(films, tmp_path / "run", *more).stdout
    assert said.count("bad film, skipped (1 so far): film007.png") == 1
    (films / "film008.png").write_bytes(b"broken too")
    stopped = run(films, tmp_path / "stopped", *more, ok=False)
    refused(stopped, "more than 1 %", "film007.png", "film008.png")


@pytest.mark.slow
def test_an_infinite_loss_stops_and_leaves_the_last_good_checkpoint(films, tmp_path):
    out = tmp_path / "run"
    more = ("--lr", "1e18", "--warmup", "0", "--save_every", "1")
    done = run(films, out, *more, ok=False)
    line = done.stderr.strip().splitlines()[-1]
    assert "NaN or infinite" in line and "--lr" in line and "Traceback" not in done.stderr
    if (out / "last.pt").is_file():
        assert all(torch.isfinite(v).all() for v in weights(out).values())


def test_settings_are_filled_in_from_the_recipe():
    demo = pretrain.fill_in(pretrain.Config(), "demo")
    paper = pretrain.fill_in(pretrain.Config(data="films", lr=1.0), "paper")
    assert (demo.size, demo.batch, demo.epochs, demo.lr) == ("tiny", 8, 34, 7.5e-4)
    assert (paper.size, paper.batch, paper.epochs, paper.lr) == ("base", 2048, 300, 1.0)
    assert (paper.pixels, paper.global_share) == (0, 1)
    assert (demo.recipe, paper.recipe) == ("demo", "paper")
    given = pretrain.Config()
    pretrain.fill_in(given, "small")
    assert given == pretrain.Config()  # the user's own settings stay as they were


@pytest.mark.parametrize(
    "given, folder",
    [
        (dict(), "runs/demo"),
        (dict(data="films"), "runs/pretrain"),
        (dict(data="films", weights="last.pt"), "runs/continue"),
        (dict(out="there", weights="last.pt"), "there"),
    ],
)
def test_the_folder_of_a_run_without_out(given, folder):
    assert pretrain.folder_of(pretrain.Config(**given)) == folder


def test_a_folder_of_fine_tuning_is_not_trained_in(tmp_path):
    checkpoint.write_json(tmp_path / "result.json", {"task": "csv"})
    with pytest.raises(UserError, match="holds a fine-tuning: choose another --out"):
        pretrain.folder_of(pretrain.Config(data="films", out=str(tmp_path)))


def test_every_recipe_works_and_stands_in_the_help(capsys, monkeypatch):
    for name in ("demo", "small", "paper"):
        args = pretrain.fill_in(pretrain.Config(data="films"), name)
        row = pretrain.NEWER_DEFAULTS | pretrain.RECIPES[name]
        assert row.items() <= vars(args).items()
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--help"])
    with pytest.raises(SystemExit):
        pretrain.main()
    said = capsys.readouterr().out
    for name, row in pretrain.RECIPES.items():
        line = re.findall(rf"^{name} .*$", said, re.M)[-1].split()  # the table ends the text
        assert {f"{value}" for value in row.values()} <= set(line)


@pytest.mark.parametrize(
    "given, films, name",
    [
        (dict(data="films"), 19_999, "small"),
        (dict(data="films"), 20_000, "paper"),
        (dict(data="films", recipe="paper"), 5, "paper"),
        (dict(data="films", recipe="small"), 10**6, "small"),
        (dict(data="films", recipe="demo"), 5, "demo"),
        (dict(), 1600, "demo"),
        (dict(recipe="small"), 1600, "small"),
        (dict(data="films", weights="last.pt"), 10**6, "continue"),
    ],
)
def test_the_number_of_films_chooses_the_recipe_and_the_user_overrules(
    tmp_path, given, films, name
):
    assert pretrain.choose_recipe(pretrain.Config(out=str(tmp_path), **given), films) == name


def test_recipe_and_weights_are_two_answers_to_one_question():
    with pytest.raises(UserError, match="--recipe small and --weights: .* leave --recipe out"):
        pretrain.main(pretrain.Config(data="films", weights="last.pt", recipe="small"))


@pytest.mark.parametrize(
    "written, name",
    [({"recipe": "small"}, "small"), ({}, "paper"), ({"recipe": "continue"}, "paper")],
)
def test_a_run_goes_on_with_its_own_recipe_though_films_were_added(tmp_path, written, name):
    """Before there was --recipe it was the paper's; without its last.pt no run was begun."""
    given = pretrain.Config(data="films", out=str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert pretrain.choose_recipe(given, 30_000) == "paper"
    assert pretrain.choose_recipe(given, 30) == "small"
    (tmp_path / "last.pt").touch()
    assert pretrain.choose_recipe(given, 30_000) == name


def test_a_short_run_has_the_recipes_share_of_warmup():
    for name, given, warmup in (
        ("paper", dict(data="films"), 40),
        ("paper", dict(data="films", epochs=10), 4 / 3),
        ("paper", dict(data="films", epochs=400), 40),
        ("paper", dict(data="films", epochs=10, warmup=7.5), 7.5),
        ("demo", dict(epochs=5), 2.7 * 5 / 34),
    ):
        args = pretrain.fill_in(pretrain.Config(**given), name)
        assert args.warmup == pytest.approx(warmup)


@pytest.mark.slow
def test_few_films_get_the_small_recipe_and_the_same_command_goes_on(films, tmp_path):
    """Ten epochs come to their peak and down again; the run keeps its recipe when FEW changes."""
    words = "--size tiny --image 32 --patch 8 --batch 8 --epochs 10 --log_every 1 --device cpu"
    command = [sys.executable, str(ROOT / "pretrain.py"), "--data", str(films), "--holdout", "4"]
    command += ["--out", str(tmp_path), *words.split()]
    small = pretrain.RECIPES["small"]
    done = subprocess.run([*command, "--max_steps", "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "recipe: small, for 33 films to train on" in done.stdout
    warmup = small["warmup"] * 10 / small["epochs"]
    share = f"the same share as the recipe's {small['warmup']:g} of {small['epochs']}"
    assert f"warm-up: {warmup:.3g} of 10 epochs, {share}" in done.stdout
    settings = json.loads((tmp_path / "config.json").read_text())
    assert {k: settings[k] for k in ("lr", "ema")} == {k: small[k] for k in ("lr", "ema")}
    assert settings["recipe"] == "small"
    # As if films had been few then and were many now.
    many = ["import pretrain; pretrain.FEW = 5; pretrain.main()", *command[2:]]
    done = subprocess.run([sys.executable, "-c", *many], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "recipe: small, for 33 films to train on" in done.stdout
    assert "resuming at step 1 of 40" in done.stdout
    rates = [float(row["lr"]) for row in log(tmp_path)]
    assert max(rates) == pytest.approx(small["lr"], rel=0.01)
    assert len(rates) == 40 and rates[-1] < 0.01 * small["lr"]
    refused(
        subprocess.run([*command, "--recipe", "paper"], capture_output=True, text=True),
        "another recipe",
        f"lr {small['lr']} → 0.0002",
    )


@pytest.mark.parametrize(
    "name, setting, words",
    [
        ("demo", dict(patch=7), "--image 96 is not a multiple of --patch 7"),
        ("demo", dict(image=48), "at least 4 × 4"),
        ("paper", dict(epochs=10, warmup=40), "--warmup 40 must be less than --epochs 10"),
        ("demo", dict(epochs=2, warmup=2), "--warmup 2 must be less than --epochs 2"),
    ],
)
def test_settings_that_cannot_work(name, setting, words):
    with pytest.raises(UserError, match=words):
        pretrain.fill_in(pretrain.Config(**setting), name)


SENSELESS = (
    "--pixels 1.5,--pixels nan,--global_share 0.0,--global_share 1.1,--batch 0,--phantoms 0,"
    "--holdout -1,--workers -1"
)


@pytest.mark.parametrize("words", SENSELESS.split(","))
def test_numbers_that_no_run_can_use(words):
    with pytest.raises(UserError, match=f"{words}: must be"):
        launch.parse(pretrain.Config, "", words.split())


# ---- One step
def loaded(count, device=CPU):
    """What the loader gives for `count` films."""
    boxes = torch.tensor([[0.0, 0, 30, 30], [5, 5, 30, 30]]).expand(count, 2, 4).contiguous()
    generator = torch.Generator().manual_seed(1)
    views = torch.randint(0, 255, (count, 2, 32, 32), dtype=torch.uint8, generator=generator)
    item = {"views": views, "boxes": boxes, "flips": torch.tensor([[True, False]] * count)}
    return {k: v.pin_memory() if device.type == "cuda" else v for k, v in item.items()}


def test_a_prepared_batch_film_by_film():
    """Targets, contexts and φ of each film from its own two crops, written out in a plain loop."""
    args = pretrain.Config(image=32, patch=8, batch=6, seed=3, global_share=1.0)
    positions = torch.tensor([1, 4])
    item = loaded(2)
    batch = pretrain.prepare(item, args, 5, positions, CPU)
    generator = torch_generator(STEP, 3, 5)
    jitter = augment.sample_jitter(6, generator)
    actions = augment.sample_actions(12, generator)
    for b, position in enumerate(positions.tolist()):
        crops = augment.to_float(item["views"][b : b + 1])
        jittered = augment.apply_jitter(crops, jitter[position : position + 1])[0]
        for view, other in ((0, 1), (1, 0)):
            row = b + 2 * view
            action = actions[position + 6 * view]
            assert torch.equal(batch["y"][row, 0], jittered[view])
            assert torch.equal(batch["action"][row], action)
            x = augment.apply_action(batch["y"][row : row + 1], action[None])
            assert torch.allclose(batch["x"][row], x[0], atol=1e-6)
            coords = augment.relative_coords(
                item["boxes"][b : b + 1, view],
                item["boxes"][b : b + 1, other],
                4,
                item["flips"][b : b + 1, view],
                item["flips"][b : b + 1, other],
            )
            assert torch.equal(batch["coords"][row], coords[0])


def test_half_of_the_other_view_is_drawn_last_and_for_the_whole_batch():
    """All other numbers are those of the whole; a film is asked alike wherever it is computed."""
    whole = pretrain.Config(image=32, patch=8, batch=6, seed=3, global_share=1.0)
    half = dataclasses.replace(whole, global_share=0.5)
    item = loaded(6)
    positions = torch.arange(6)
    full = pretrain.prepare(item, whole, 5, positions, CPU)
    assert full.pop("asked") is None
    batch = pretrain.prepare(item, half, 5, positions, CPU)
    assert all(torch.equal(value, batch[name]) for name, value in full.items())
    assert batch["asked"].shape == (12, 8)
    part = {name: value[[1, 4]] for name, value in item.items()}
    some = pretrain.prepare(part, half, 5, positions[[1, 4]], CPU)
    assert torch.equal(some["asked"], batch["asked"][[1, 4, 7, 10]])
    other_step = pretrain.prepare(item, half, 6, positions, CPU)
    assert not torch.equal(other_step["asked"], batch["asked"])


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
        ),
    ],
)
def test_the_host_never_waits_while_a_batch_is_prepared(device):
    """Else a GPU would stand idle between steps."""
    args = pretrain.Config(image=32, patch=8, batch=4, seed=0, global_share=0.5)
    device = torch.device(device)
    item = loaded(2, device)
    positions = torch.arange(2)
    waits = bench.count_waits(lambda: pretrain.prepare(item, args, 0, positions, device), device)
    assert waits == 0


def test_a_step_of_micro_batches_equals_one_of_the_whole_batch():
    args = pretrain.Config(
        image=32, patch=8, batch=4, seed=0, global_share=1.0, precision="float32"
    )
    item = loaded(4)
    after = []
    for micro in (4, 1):
        torch.manual_seed(0)
        world = CheXWorld(32, 8, **SIZES["tiny"])
        optimizer = torch.optim.SGD(pretrain.parameter_groups(world, 0.0), lr=0.1)
        args = dataclasses.replace(args, micro=micro)
        batches = []
        for start in range(0, 4, micro):
            rows = torch.arange(start, start + micro)
            part = {key: value[rows] for key, value in item.items()}
            batches.append(pretrain.prepare(part, args, 0, rows, CPU))
        losses, pooled, norm = pretrain.train_step(world, optimizer, batches, args, ALONE)
        assert set(losses) == {*LOSSES, "loss"} and len(losses["loss"]) == 4 // micro
        assert pooled.shape == (8, SIZES["tiny"]["dim"]) and norm > 0
        after.append((losses["loss"].mean().item(), world.state_dict()))
    (loss, whole), (loss_of_parts, parts) = after
    assert loss == pytest.approx(loss_of_parts, rel=1e-5)
    assert largest_difference(whole, parts) < 1e-5


@pytest.mark.slow
def test_a_demo_whose_phantoms_are_gone_draws_them_again_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "judge_on_held_out", lambda *ignored: None)
    demo = pretrain.Config(out=str(tmp_path), phantoms=24, image=64, batch=4, device="cpu")
    pretrain.main(dataclasses.replace(demo, max_steps=1))
    shutil.rmtree(tmp_path / "phantoms")
    pretrain.main(dataclasses.replace(demo, max_steps=2))
    assert [row["step"] for row in log(tmp_path)][-1] == "2"
