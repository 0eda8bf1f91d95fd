"""Synthetic films: truth and pixels agree, (seed, index) decide all, files hold what is drawn."""

import csv
import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from plumbing import phantom
from plumbing.launch import Team, UserError
from plumbing.phantom import DOMAINS, FINDINGS, LANDMARKS, make_phantom, write_phantoms


@pytest.fixture(scope="module")
def films():
    """120 phantoms at a small size, index → dict."""
    return [make_phantom(3, index, size=128) for index in range(120)]


def cardiothoracic_ratio(item):
    """Width of the heart over that of the lung fields together, as read off a film with a ruler."""

    def width(mask):
        return np.ptp(np.flatnonzero(mask.any(0))) + 1

    return width(item["heart"]) / width(item["lungs"])


def brightness_gain(index, finding, size=128):
    """What a finding adds to one patient's film (float image), the film without it, and with it."""
    without = make_phantom(1, index, size, findings=())
    with_it = make_phantom(1, index, size, findings=(finding,))
    return with_it["film"].astype(float) - without["film"], without, with_it


@pytest.mark.parametrize("size", (64, 96, 256, 512))
def test_shapes_and_types_at_every_size(size):
    item = make_phantom(0, 5, size)
    assert item["film"].shape == item["lungs"].shape == item["heart"].shape == (size, size)
    assert item["film"].dtype == np.uint8 and item["lungs"].dtype == item["heart"].dtype == bool
    assert item["labels"].shape == (len(FINDINGS),)
    assert item["landmarks"].shape == (len(LANDMARKS), 2)


def test_same_seed_and_index_same_film_others_differ():
    first = make_phantom(7, 4, 96)
    np.random.seed(1)
    assert not np.array_equal(first["film"], make_phantom(8, 4, 96)["film"])
    assert not np.array_equal(first["film"], make_phantom(7, 5, 96)["film"])
    again = make_phantom(7, 4, 96)
    assert all(np.array_equal(first[key], again[key]) for key in first)


def test_anatomy_is_the_same_at_another_size():
    small, large = make_phantom(5, 11, 128), make_phantom(5, 11, 256)
    assert np.array_equal(small["labels"], large["labels"]) and small["domain"] == large["domain"]
    expected = np.array(large["marker"]) / 256
    for item in (small, make_phantom(5, 11, 64)):
        marker = np.array(item["marker"]) / len(item["film"])
        assert np.allclose(marker, expected, atol=0.51 / 64 + 0.51 / 256)
    assert np.allclose((small["landmarks"] + 0.5) * 2, large["landmarks"] + 0.5)
    shrunk = np.asarray(Image.fromarray(large["lungs"]).convert("L").reduce(2)) > 127
    assert (shrunk != small["lungs"]).mean() < 0.01


def test_two_films_of_a_patient_share_the_findings_and_not_the_pose(films):
    neighbours = zip(films, films[1:], strict=False)
    pairs = [(a, b) for a, b in neighbours if a["patient"] == b["patient"]]
    assert len(pairs) == 40  # every other patient has two films
    assert all(np.array_equal(a["labels"], b["labels"]) for a, b in pairs)
    assert all(not np.array_equal(a["landmarks"], b["landmarks"]) for a, b in pairs)
    assert any(a["domain"] != b["domain"] for a, b in pairs)


@pytest.mark.slow
def test_prevalence_and_domains():
    items = [make_phantom(0, index, 64) for index in range(600)]
    labels = np.array([item["labels"] for item in items])
    domains = [item["domain"] for item in items]
    assert 0.34 < (labels.sum(1) == 0).mean() < 0.46
    assert all(0.15 < share < 0.27 for share in labels.mean(0)), labels.mean(0)
    assert np.bincount(domains, minlength=len(DOMAINS)).min() > 60


def test_masks_and_landmarks_agree_with_each_other(films):
    for item in films:
        size = len(item["film"])
        knob, hilum, ventricle, clavicle = item["landmarks"]
        assert (item["landmarks"] > 0).all() and (item["landmarks"] < size - 1).all()
        assert not (item["lungs"] & item["heart"]).any()
        assert item["heart"][tuple(np.round(ventricle).astype(int))]
        assert 0.2 < item["lungs"].mean() < 0.55
        columns = np.nonzero(item["lungs"])[1]
        middle = (columns.min() + columns.max()) / 2
        assert np.nonzero(item["heart"])[1].mean() > middle  # the heart is on the image's right
        assert ventricle[1] > knob[1] > hilum[1] > clavicle[1]
        assert clavicle[0] < knob[0] < hilum[0] < ventricle[0]


def test_lungs_are_darker_than_the_heart(films):
    normal = [item for item in films if not item["labels"].any()]
    assert len(normal) > 20
    for item in normal:
        assert item["film"][item["lungs"]].mean() + 15 < item["film"][item["heart"]].mean()


def test_cardiomegaly_is_a_heart_wider_than_half_the_chest(films):
    has = FINDINGS.index("cardiomegaly")
    big = [cardiothoracic_ratio(item) for item in films if item["labels"][has]]
    small = [cardiothoracic_ratio(item) for item in films if not item["labels"][has]]
    assert len(big) > 10 and min(big) > 0.5 > max(small), (min(big), max(small))


@pytest.mark.parametrize("index", (0, 1, 4, 7, 12))
def test_effusion_fills_the_costophrenic_angle_of_one_side(index):
    gain, without, with_it = brightness_gain(index, "effusion")
    assert np.array_equal(without["lungs"], with_it["lungs"])
    assert np.array_equal(without["landmarks"], with_it["landmarks"])
    spine = without["landmarks"][1, 1] + 9  # 7 % of the film away from the right hilum
    half = np.arange(128) < spine
    angles = []
    for side in (half, ~half):
        field = without["lungs"] & side
        low = field & (np.arange(128)[:, None] > np.flatnonzero(field.any(1))[-1] - 10)
        angles.append(gain[low].mean())
    assert max(angles) > 12 and abs(min(angles)) < 4, angles


@pytest.mark.parametrize("index", range(0, 40, 5))
def test_nodules_are_small_bright_spots_inside_the_lungs(index):
    gain, without, _ = brightness_gain(index, "nodule", 256)
    spots, count = ndimage.label(gain > 0.5 * gain.max())
    assert 1 <= count <= 3 and without["lungs"][spots > 0].mean() > 0.98
    for rows, cols in ndimage.find_objects(spots):
        longest = max(rows.stop - rows.start, cols.stop - cols.start)
        assert 0.015 * 256 < longest < 0.16 * 256  # two balls may touch


def test_patients_have_one_two_or_three_nodules_on_either_side():
    patients = [phantom.make_patient(np.random.default_rng(seed), False) for seed in range(60)]
    assert {len(p.spot["nodule"]) for p in patients} == {1, 2, 3}
    assert {p.side["nodule"] for p in patients} == {-1, 1}


# Grey values (of 255) by which the strongest pixel changes at 64 px, and how many change by 8.
SEEN = dict(
    effusion=(30, 40), cardiomegaly=(40, 100), nodule=(24, 8), pneumothorax=(12, 90),
    consolidation=(16, 24),
)  # fmt: skip


@pytest.mark.parametrize("finding", FINDINGS)
def test_a_finding_is_seen_at_64_px_and_changes_the_chest_alone(finding):
    for index in range(0, 24, 3):
        change, without, with_it = brightness_gain(index, finding)
        change = np.abs(change.reshape(64, 2, 64, 2).mean((1, 3)))
        strongest, pixels = SEEN[finding]
        assert change.max() > strongest and (change > 8).sum() > pixels
        chest = without["lungs"] | without["heart"] | with_it["heart"]
        chest = chest.reshape(64, 2, 64, 2).any((1, 3))
        assert change[chest].sum() > 0.85 * change.sum()


@pytest.mark.parametrize("index", (0, 2, 3, 9))
def test_pneumothorax_darkens_the_rim_of_one_lung(index):
    gain, without, _ = brightness_gain(index, "pneumothorax")
    changed = np.abs(gain) > 3
    assert (without["lungs"] | without["heart"])[changed].mean() > 0.7
    lung = without["lungs"]
    rims = []
    for half in (np.arange(128) < 64, np.arange(128) >= 64):
        field = lung & half
        if half[0]:
            rim = np.argmax(field, 1) + 3
        else:
            rim = 127 - np.argmax(field[:, ::-1], 1) - 3
        rows = np.flatnonzero(field.any(1))[8:24]
        rims.append(gain[rows, rim[rows]].mean())
    assert min(rims) < -2 and min(rims) < max(rims) - 2, rims


@pytest.mark.parametrize("index", (0, 2, 3, 9))
def test_consolidation_takes_air_out_of_one_lung(index):
    gain, without, _ = brightness_gain(index, "consolidation")
    assert gain[without["lungs"]].max() > 15
    assert gain.sum() > 0 and without["lungs"][gain > 8].mean() > 0.8


def test_mirrored_heart_lies_on_the_other_side():
    for index in range(6):
        usual = make_phantom(0, index, 128)
        planted = make_phantom(0, index, 128, anomaly="mirrored heart")
        middle = usual["landmarks"][1, 1] + 128 * 0.08  # hila stay where they were
        assert planted["landmarks"][2, 1] < middle < usual["landmarks"][2, 1]
        assert planted["heart"][tuple(np.round(planted["landmarks"][2]).astype(int))]
        assert np.allclose(usual["landmarks"][[1, 3]], planted["landmarks"][[1, 3]])


def test_missing_lung_is_white_and_out_of_the_mask():
    for index in range(6):
        usual = make_phantom(0, index, 128, findings=())
        planted = make_phantom(0, index, 128, anomaly="missing lung", findings=())
        gone = usual["lungs"] & ~planted["lungs"]
        assert 0.3 < gone.sum() / usual["lungs"].sum() < 0.7
        assert planted["film"][gone].mean() > usual["film"][gone].mean() + 25
        assert np.array_equal(usual["heart"], planted["heart"])


def test_unknown_anomaly_and_finding_are_refused():
    with pytest.raises(ValueError, match="upside down"):
        make_phantom(0, 0, 64, anomaly="upside down")
    with pytest.raises(ValueError, match="gout"):
        make_phantom(0, 0, 64, findings=("gout",))


def test_marker_box_holds_the_brightest_ink(films):
    names = [DOMAINS[item["domain"]].name for item in films]
    others = [item for item, name in zip(films, names, strict=True) if name != "portable"]
    marked = [item for item in others if item["marker"]]
    assert len(marked) > 30
    for item in marked:
        top, left, height, width = item["marker"]
        assert item["film"][top : top + height + 2, left : left + width + 2].max() > 200


def command(*flags, check=False):
    """Run python -m plumbing.phantom. → its exit code and output"""
    words = [sys.executable, "-m", "plumbing.phantom", *flags]
    return subprocess.run(words, check=check, capture_output=True, text=True)


def read_rows(path):
    """The rows of a phantoms.csv."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def read_image(path):
    return np.asarray(Image.open(path))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """60 phantoms written by the command itself, in two processes."""
    out = tmp_path_factory.mktemp("phantoms")
    command("--out", str(out), *"--count 60 --size 64 --seed 2 --workers 2".split(), check=True)
    return out


@pytest.mark.slow
def test_files_hold_what_make_phantom_returns(folder):
    rows = read_rows(folder / "phantoms.csv")
    files = sorted(path.name for path in (folder / "films").iterdir())
    assert [row["filename"] for row in rows] == files
    for index in (0, 1, 17, 59):
        row = rows[index]
        item = make_phantom(2, index, 64)
        assert np.array_equal(read_image(folder / "films" / row["filename"]), item["film"])
        assert np.array_equal(read_image(folder / row["mask"]) > 0, item["lungs"])
        assert np.array_equal(read_image(folder / row["heart"]) == 255, item["heart"])
        found = [name for name, has in zip(FINDINGS, item["labels"], strict=True) if has]
        assert row["label"].split("|") == (found or ["normal"])
        read = [[float(row[f"{name}_row"]), float(row[f"{name}_col"])] for name in LANDMARKS]
        assert np.allclose(read, item["landmarks"], atol=0.006)
        assert int(row["domain"]) == item["domain"]
        marker = "" if item["marker"] is None else "|".join(map(str, item["marker"]))
        assert row["marker"] == marker


@pytest.mark.slow
def test_splits_are_by_patient(folder):
    splits = {}
    for row in read_rows(folder / "phantoms.csv"):
        splits.setdefault(row["patient_id"], set()).add(row["split"])
    assert len(splits) == 40 and all(len(found) == 1 for found in splits.values())
    assert {next(iter(found)) for found in splits.values()} == {"train", "val", "test"}


@pytest.mark.slow
def test_split_shares(tmp_path, monkeypatch):
    blank = np.zeros((4, 4), bool)
    row = dict(film=blank.astype(np.uint8), lungs=blank, heart=blank, labels=np.zeros(5))
    row |= dict(landmarks=np.zeros((4, 2)), domain=0, marker=None)
    monkeypatch.setattr(phantom, "make_phantom", lambda seed, index, size: dict(row, patient=index))
    splits = [row["split"] for row in read_rows(write_phantoms(tmp_path, 1000, 4))]
    assert abs(splits.count("train") / 1000 - 0.7) < 0.05
    assert abs(splits.count("val") / 1000 - 0.1) < 0.03
    assert abs(splits.count("test") / 1000 - 0.2) < 0.04


@pytest.mark.slow
def test_one_worker_writes_the_same_files(folder, tmp_path):
    def files_in(root):
        return sorted(file.relative_to(root) for file in root.rglob("*") if file.is_file())

    path = write_phantoms(tmp_path, 60, 64, seed=2, workers=1)
    assert path == tmp_path / "phantoms.csv"
    files = files_in(tmp_path)
    assert files == files_in(folder)
    assert len(files) == 3 * 60 + 1  # no temporary file is left
    for file in files:
        assert (tmp_path / file).read_bytes() == (folder / file).read_bytes()


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--size", "32"], "64 to 512"),
        (["--count", "0"], "above 0"),
        (["--seed", "-1"], "0 or more"),
    ],
)
def test_a_bad_flag_is_one_clear_line(flags, words):
    with pytest.raises(UserError, match=words):
        phantom.main(flags)


@pytest.mark.slow
def test_the_command_turns_an_error_into_one_line():
    result = command("--size", "32")
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1 and "64 to 512" in result.stderr


def test_drawing_again_leaves_nothing_of_another_drawing(tmp_path):
    phantom.write_phantoms(tmp_path, 5, size=64, seed=1)
    phantom.write_phantoms(tmp_path, 3, size=64, seed=2)
    assert [len(list((tmp_path / kind).iterdir())) for kind in ("films", "masks", "hearts")] == [
        3
    ] * 3


@dataclasses.dataclass
class Demo:
    """What draw_demo asks of the flags of pretrain.py."""

    out: str
    phantoms: int = 2
    seed: int = 0
    data: str | None = None
    probe: str | None = None


def test_the_demo_draws_once_and_takes_no_others(tmp_path):
    """A start ended before its first checkpoint; another one comes into the same folder."""
    team = Team(0, 1, torch.device("cpu"))
    drawn = phantom.draw_demo(Demo(str(tmp_path)), 64, team)
    assert len(list((tmp_path / "phantoms" / "films").iterdir())) == 2
    assert drawn.data == str(tmp_path / "phantoms" / "films")
    assert drawn.probe == str(tmp_path / "phantoms" / "phantoms.csv")
    assert phantom.draw_demo(Demo(str(tmp_path)), 64, team) == drawn
    for other, image in ((dict(seed=1), 64), (dict(), 128), (dict(phantoms=3), 64)):
        with pytest.raises(UserError, match="phantoms of another --phantoms, --seed or --image"):
            phantom.draw_demo(Demo(str(tmp_path), **other), image, team)
