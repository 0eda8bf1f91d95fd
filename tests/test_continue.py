"""pretrain.py --weights: what is taken, what is new, and that such a run resumes like any other."""

import dataclasses
import shutil

import pytest
import torch
from test_pretrain import SMALL, largest_difference, log, refused, run, started, weights
from worlds import shaken

import pretrain
from data import open_films
from lab.common import trained_on
from model import SIZES as NETWORKS
from model import CheXWorld, ViT
from plumbing import launch, phantom
from plumbing.launch import UserError
from plumbing.weights import find_origin, load_encoder, load_world, resized

TOTAL = 20  # steps: 36 - 3 held-out films, batches of 8, five epochs
ALONE = 2  # a tenth of them
LONG = ("--epochs", "5", "--lr", "1e-3")


@pytest.fixture(scope="module", name="films")
def draw_films(tmp_path_factory):
    folder = tmp_path_factory.mktemp("films")
    phantom.write_phantoms(folder, 36, size=64, seed=5)
    return folder / "films"


def save_world(path, **more):
    """A run's last.pt, as far as others read it; its two encoders differ."""
    torch.manual_seed(3)
    world = CheXWorld(32, 8, **NETWORKS["tiny"], **more)
    shaken(world.target_encoder, seed=1)
    torch.save({"world": world.state_dict(), "config": world.config, "step": 1}, path)
    return path


def save_encoder(path):
    torch.manual_seed(4)
    vit = ViT(32, 8, 128, 4, 4)
    torch.save({"encoder": vit.state_dict(), "config": vit.config, "step": 1}, path)
    return path


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return save_encoder(tmp_path_factory.mktemp("weights") / "encoder.pt")


@pytest.fixture(scope="module")
def reference(films, encoder, tmp_path_factory):
    """An undisturbed run that starts from an encoder alone."""
    out = tmp_path_factory.mktemp("run") / "whole"
    done = run(films, out, *LONG, "--weights", encoder)
    return out, done.stdout


def part(state, name):
    return {k.removeprefix(name): v for k, v in state.items() if k.startswith(name)}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


# ---- An encoder alone: its predictor learns first
@pytest.mark.slow
def test_the_encoders_stand_still_for_as_many_steps_as_is_said_then_learn(
    films, encoder, reference, tmp_path
):
    """Stopped after each of the first steps, which changes nothing of the rest."""
    given = load_encoder(encoder).state_dict()
    out = tmp_path / "parts"
    before = None
    for steps in (ALONE, ALONE + 1):
        said = run(films, out, *LONG, "--weights", encoder, "--max_steps", str(steps)).stdout
        state = weights(out)
        predictor = part(state, "predictor.")
        assert before is None or not same(predictor, before)
        before = predictor
        is_alone = steps <= ALONE
        assert same(part(state, "encoder."), given) == is_alone
        assert same(part(state, "target_encoder."), given) == is_alone
    assert "resumes from its own last.pt" in said
    whole, said = reference
    assert f"the predictor learns alone for the first {ALONE} of {TOTAL} steps" in said
    assert "taken: both encoders; new: the predictor and the optimizer" in said
    run(films, out, *LONG, "--weights", encoder)
    assert largest_difference(weights(whole), weights(out)) == 0
    assert [row["lr"] for row in log(whole)] == [row["lr"] for row in log(out)]


@pytest.mark.slow
def test_the_encoder_has_the_schedule_of_the_rest(reference):
    """Its learning rate at the end of the run, and the predictor's, from the optimizer saved."""
    whole, _ = reference
    saved = torch.load(whole / "last.pt", weights_only=True)
    groups = saved["optimizer"]["param_groups"]
    assert [group.get("late", 0) for group in groups] == [0, 0, ALONE, ALONE]
    warmup = 2  # half an epoch of four steps
    for group in groups:
        late = group.get("late", 0)
        times = (TOTAL - 1 - late, TOTAL - late, warmup)
        assert group["lr"] == pytest.approx(launch.warmup_cosine(*times, 1e-3, 1e-6))
    assert saved["recipe"]["weights"] and "pixels" not in saved["recipe"]


@pytest.mark.slow
def test_nobody_knows_what_a_run_has_seen_that_started_from_weights(films, reference):
    """What its own hold-out tells is not all: the weights may have seen the films held out."""
    whole, _ = reference
    opened = open_films(films, whole)
    assert trained_on(whole / "last.pt", opened) is None
    saved = torch.load(whole / "last.pt", weights_only=True)
    del saved["recipe"]["weights"]
    folder = whole.parent / "scratch"
    folder.mkdir()
    shutil.copy(whole / "config.json", folder)
    torch.save(saved, folder / "last.pt")
    assert len(trained_on(folder / "last.pt", opened)[0]) == saved["recipe"]["films"]


@pytest.mark.slow
def test_two_ranks_equal_one_process(films, encoder, reference, tmp_path):
    whole, _ = reference
    run(films, tmp_path / "two", *LONG, "--micro", "2", "--weights", encoder, ranks=2)
    assert largest_difference(weights(whole), weights(tmp_path / "two")) < 1e-4


@pytest.mark.slow
def test_kill_nine_then_the_same_command_without_the_file(films, encoder, tmp_path):
    """Even a run whose weights were moved away is not lost; but other weights are refused."""
    copy = shutil.copy(encoder, tmp_path / "moved.pt")
    more = ("--weights", str(copy), "--save_every", "2", "--epochs", "10")
    run(films, tmp_path / "whole", *more)
    process = started(films, tmp_path / "killed", 5, *more)
    process.kill()
    process.wait()
    save_world(copy)
    changed = run(films, tmp_path / "killed", *more, ok=False)
    refused(changed, "moved.pt is not the file that the run in", "SHA-256")
    copy.unlink()
    said = run(films, tmp_path / "killed", *more).stdout
    assert "no longer there; not needed" in said and "resuming at step" in said
    assert largest_difference(weights(tmp_path / "whole"), weights(tmp_path / "killed")) == 0
    refused(run(films, tmp_path / "killed", ok=False), "another recipe", "weights ", "→ not given")


# ---- A whole world
@pytest.mark.slow
def test_a_world_goes_on_with_both_its_encoders_and_its_predictor(films, tmp_path):
    """At next to no learning rate all weights stay; else they move from the first step on."""
    path = save_world(tmp_path / "last.pt")
    world = torch.load(path, weights_only=True)["world"]
    small = ("--weights", str(tmp_path), "--max_steps", "1", "--warmup", "0")
    still = ("--lr", "1e-30", "--min_lr", "0", "--ema", "1")
    said = run(films, tmp_path / "still", *small, *still).stdout
    assert "taken: encoders and predictor; new: the optimizer" in said and "alone" not in said
    assert largest_difference(weights(tmp_path / "still"), world) < 1e-20
    run(films, tmp_path / "moves", *small)
    for name in ("encoder.", "predictor.", "target_encoder."):
        assert not same(part(weights(tmp_path / "moves"), name), part(world, name))


@pytest.mark.slow
def test_another_image_size(films, tmp_path):
    """Positions are resampled, and the predictor first learns the new grid alone."""
    path = save_world(tmp_path / "last.pt")
    more = ("--weights", str(path), "--image", "48", *LONG, "--max_steps", str(ALONE))
    said = run(films, tmp_path / "run", *more).stdout
    assert "resampled from 32² px in 8² patches to 48² px in 8² patches" in said
    assert f"alone for the first {ALONE} of {TOTAL} steps" in said
    world = load_world(tmp_path / "run" / "last.pt")
    expected = resized(load_encoder(path, "context"), 48, 8)
    assert same(world.encoder.state_dict(), expected.state_dict())
    assert not same(world.predictor.state_dict(), load_world(path).predictor.state_dict())


# ---- Settings
def fill_in(path, out, **given):
    config = pretrain.Config(data="films", weights=str(path), out=str(out), **given)
    return pretrain.fill_in(config, "continue", find_origin(config.weights, out))


def test_settings_come_from_the_file_and_from_the_recipe_for_continuing(encoder, tmp_path):
    args = fill_in(encoder, tmp_path)
    assert (args.size, args.image, args.patch) == ("tiny", 32, 8)
    row = pretrain.RECIPES["continue"]
    assert (args.batch, args.epochs, args.warmup, args.lr, args.ema) == tuple(
        row[name] for name in ("batch", "epochs", "warmup", "lr", "ema")
    )
    assert fill_in(encoder, tmp_path, image=64, size="tiny").image == 64
    assert fill_in(encoder, tmp_path, epochs=10).warmup == pytest.approx(0.5)
    paper = pretrain.RECIPES["paper"]
    assert row["lr"] < paper["lr"] and row["ema"] > paper["ema"]
    assert row["warmup"] / row["epochs"] < paper["warmup"] / paper["epochs"]


def test_a_run_without_weights_is_what_it_was():
    """So that old runs resume: the recipe's keys, and AdamW's two groups."""
    args = pretrain.fill_in(pretrain.Config(data="x", size="tiny", image=32, patch=8), "paper")
    assert not {"weights", "pixels"} & pretrain.fingerprint_of(args, ["a.png"]).keys()
    world = pretrain.make_world(args, None, CheXWorld)
    optimizer = pretrain.make_optimizer(world, args, None, 100)
    trained = [*world.encoder.parameters(), *world.predictor.parameters()]
    decay, others = optimizer.param_groups
    assert [id(p) for p in decay["params"]] == [id(p) for p in trained if p.dim() > 1]
    assert [id(p) for p in others["params"]] == [id(p) for p in trained if p.dim() <= 1]
    for step in (0, 7, 99):
        lr = pretrain.set_learning_rate(optimizer, step, 100, 10, args)
        assert lr == launch.warmup_cosine(step, 100, 10, args.lr, args.min_lr)
        assert decay["lr"] == others["lr"] == lr


def test_home_is_put_for_a_tilde(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    save_encoder(tmp_path / "encoder.pt")
    args = launch.parse(pretrain.Config, "", [*SMALL, "--weights=~/encoder.pt"])
    assert find_origin(args.weights, tmp_path / "run").settings()["size"] == "tiny"


# ---- Refusals
@pytest.mark.parametrize(
    "given, words",
    [
        (dict(size="base"), "--size base: .*last.pt is tiny; leave --size out"),
        (dict(pixels=0.5), "--pixels 0.5 .* was trained with --pixels 0"),
        (dict(patch=5), "not a multiple of --patch 5"),
    ],
)
def test_contradictions_are_refused(tmp_path, given, words):
    with pytest.raises(UserError, match=words) as error:
        fill_in(save_world(tmp_path / "last.pt"), tmp_path / "out", **given)
    assert "\n" not in str(error.value)


def test_a_pixel_head_is_kept_or_the_run_refused(tmp_path):
    path = save_world(tmp_path / "last.pt", pixels=0.5)
    assert fill_in(path, tmp_path / "out", pixels=0.5).pixels == 0.5
    for given in (dict(), dict(pixels=1.0), dict(pixels=0.5, patch=4)):
        with pytest.raises(UserError, match="start from its encoder.pt"):
            fill_in(path, tmp_path / "out", **given)
    alone = save_encoder(tmp_path / "encoder.pt")
    assert fill_in(alone, tmp_path / "out", pixels=1.0).pixels == 1  # its predictor is new


def test_files_that_cannot_be_started_from(tmp_path):
    ablated = {"tasks": "local", "delta": True, "action": True, "unified": True}
    path = save_world(tmp_path / "last.pt")
    saved = torch.load(path, weights_only=True)
    torch.save(saved | {"config": saved["config"] | ablated}, tmp_path / "ablated.pt")
    (tmp_path / "empty").mkdir()
    (tmp_path / "junk.pt").write_bytes(b"junk")
    out = tmp_path / "out"
    for name, words in (
        ("ablated.pt", "an ablated run .tasks local.*its encoder.pt"),
        ("empty", "neither last.pt nor encoder.pt"),
        ("junk.pt", "not a checkpoint"),
        ("none.pt", "none.pt: no such file"),
    ):
        with pytest.raises(UserError, match=words) as error:
            find_origin(str(tmp_path / name), out)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="is not a checkpoint of this program"):
        find_origin(str(path), tmp_path)  # --out is where the weights lie, which no run wrote
    torch.save(saved | {"recipe": {"lr": 1}}, path)
    with pytest.raises(UserError, match="did not start from --weights"):
        find_origin(str(path), tmp_path)


@pytest.mark.slow
def test_a_missing_file_is_said_before_films_are_looked_for(tmp_path):
    out = tmp_path / "out"
    none = str(tmp_path / "none.pt")
    refused(run(tmp_path / "nowhere", out, "--weights", none, ok=False), "none.pt: no such file")
    assert not out.exists()


def test_of_a_fine_tuned_model_the_encoder_is_taken_and_this_is_said(tmp_path):
    vit = ViT(32, 8, 128, 4, 4)
    state = {f"vit.{name}": tensor for name, tensor in vit.state_dict().items()}
    state |= {"head.weight": torch.zeros(2, 128), "head.bias": torch.zeros(2)}
    best = {"finetuned": state, "config": vit.config, "labels": ["a", "b"], "kind": "labels"}
    torch.save(best, tmp_path / "best.pt")
    origin = find_origin(str(tmp_path / "best.pt"), tmp_path / "out")
    assert "fine-tuned model, which has learnt from labels" in origin.describe(32, 8, TOTAL)
    assert same(origin.encoder.state_dict(), vit.state_dict()) and origin.predictor is None


def test_only_pretrain_has_the_flag():
    """lab.ablation's worlds are compared with each other, from the same first weights."""
    from lab import ablation

    with pytest.raises(UserError, match="--weights: only pretrain.py has it"):
        ablation.train(dataclasses.replace(ablation.TrainConfig(), weights="a.pt"))
