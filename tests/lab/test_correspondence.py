"""Correspondence: pooling against a loop, known landmarks, landmarks of a drawn mask."""

import csv
import json

import numpy as np
import pytest
import torch
from lab_for_tests import good, make_here, make_place  # noqa: F401 (fixtures)

from lab import correspondence
from plumbing import phantom
from plumbing.launch import UserError


# ---------------------------------------------------------------- features
@pytest.mark.parametrize("grid, side", [(4, 16), (5, 12), (7, 7)])
def test_roi_pooling_is_the_mean_over_two_by_two_patches_around_each_pixel(grid, side):
    torch.manual_seed(0)
    tokens = torch.randn(2, grid * grid, 3)
    pooled = correspondence.roi_pool(tokens, side)
    fine = 2  # 2 · side samples per patch: all window edges fall between samples
    patches = tokens.view(2, grid, grid, 3).double().numpy()
    sheet = patches.repeat(fine * side, 1).repeat(fine * side, 2)  # piecewise constant features
    last = grid * fine * side

    def window(position):  # of the pixel's centre, in samples
        centre = round((position + 0.5) * grid * fine)
        return slice(max(0, centre - fine * side), min(last, centre + fine * side))

    for row in range(0, side, 3):
        for col in range(0, side, 2):
            expected = sheet[:, window(row), window(col)].mean((1, 2))
            assert np.allclose(pooled[:, row, col], expected, atol=1e-5)


def test_raw_windows_hold_the_grey_values_around_a_pixel():
    image = torch.rand(1, 1, 12, 12)
    windows = correspondence.raw_windows(image, 12, 6)  # patches of 2 px: windows of 5 × 5
    assert torch.allclose(windows[0, 6, 4], image[0, 0, 4:9, 2:7].flatten(), atol=1e-5)


# ---------------------------------------------------------------- find and score
def test_a_landmark_is_found_where_its_feature_is():
    torch.manual_seed(0)
    features = torch.randn(3, 16, 16, 8)
    places = np.array([[0.1, 0.9], [0.53, 0.28]])
    at = (places * 16).astype(int)
    for film, (dr, dc) in ((1, (2, -3)), (2, (-1, 1))):
        for r, c in at:
            features[film, r + dr, c + dc] = features[0, r, c]
    found = correspondence.nearest(correspondence.heat_maps(features[0], places, features[1:]))
    assert np.allclose(found[0], (at + [2, -3] + 0.5) / 16)
    assert np.allclose(found[1], (at + [-1, 1] + 0.5) / 16)


def test_find_uses_each_reference_alone():
    torch.manual_seed(1)
    images = torch.rand(5, 1, 16, 16)
    places = np.random.default_rng(0).random((2, 3, 2))

    def way(x):
        return torch.cat([x[:, 0, ..., None], x[:, 0, ..., None].roll(1, 1)], -1)

    found = correspondence.find(way, images[:2], places, images[2:], batch=2)
    assert found.shape == (2, 3, 3, 2)
    for r in (0, 1):
        reference = way(images[r : r + 1])[0]
        maps = correspondence.heat_maps(reference, places[r], way(images[2:]))
        assert np.allclose(found[r], correspondence.nearest(maps))


def test_score_counts_in_percent_of_the_width():
    true = np.array([[[0.5, 0.5], [0.2, 0.2]]])
    shapes = np.array([[200.0, 100.0]])
    found = np.array([[[[0.52, 0.5], [0.2, 0.28]]]])  # 4 of 200 rows = 4 % of the width; 8 %
    row = correspondence.score(found, true, shapes)
    values = [row["distance"], row["pck@5"], row["pck@10"], *row["distance_each"]]
    assert np.allclose(values, [6, 50, 100, 4, 8])


def test_the_mean_place_leaves_out_the_film_asked_about():
    places = np.random.default_rng(0).random((4, 3, 2))
    others = correspondence.mean_of_others(places)
    assert np.allclose(others[2], places[[0, 1, 3]].mean(0))


# ---------------------------------------------------------------- where the landmarks truly are
def test_a_random_box_holds_the_landmarks_and_moves_them():
    rng = np.random.default_rng(0)
    places = np.array([[0.4, 0.5], [0.6, 0.7]])
    shape = (200.0, 300.0)
    boxes = np.array([correspondence.box_around(rng, shape, places) for _ in range(50)])
    inside = (places * shape - boxes[:, None, :2]) / boxes[:, None, 2:]
    assert inside.min() > 0 and inside.max() < 1 and (inside.std(0) > 0.05).all()
    assert (boxes[:, 2:].prod(1) < 0.81 * 6e4).all()
    corners = np.array([[0.0, 0.0], [1.0, 1.0]])
    assert correspondence.box_around(rng, shape, corners).tolist() == [0, 0, 200, 300]


def test_landmarks_of_a_mask():
    mask = np.zeros((100, 200), bool)
    mask[20:81, 40:80] = mask[30:71, 120:170] = True
    mask[10:20, 58:61] = True  # the right lung's tip
    right_apex, left_apex, right_angle, left_angle = (
        correspondence.from_mask(mask) * (100, 200) - 0.5
    )
    assert np.allclose(right_apex, [10.5, 59], atol=0.6) and abs(left_apex[0] - 30.5) < 1
    assert np.allclose(right_angle, [80, 40]) and np.allclose(left_angle, [70, 169])
    assert correspondence.from_mask(np.zeros((9, 9), bool)) is None


# ---------------------------------------------------------------- as a user runs it
class Grey(list):
    """Two grey films."""

    names = ("a.png", "b.png")

    def __init__(self):
        super().__init__([np.zeros((20, 20), np.uint8)] * 2)


def test_points_that_are_missing_are_refused_and_films_go_by_any_name(tmp_path):
    films = Grey()
    table = tmp_path / "points.csv"
    table.write_text("Image Index,tip_row,tip_col\na.png,4,5\nb.png,6,7\n")
    numbers, places, _, names = correspondence.read_landmarks(table, films, 2)
    assert (numbers.tolist(), names) == ([0, 1], ["tip"])
    assert np.allclose(places[:, 0] * 20 - 0.5, [(4, 5), (6, 7)])
    kept = correspondence.of_other_patients(np.array(list("abbac")), 1, table)
    assert kept.tolist() == [0, 1, 2, 4]  # the fourth film is of the reference's patient
    with pytest.raises(UserError, match="of the patients of the 2 reference films"):
        correspondence.of_other_patients(np.array(list("abba")), 2, table)
    for cells in ("-1,-1", "nan,nan", "21,5", "na,"):
        table.write_text(f"Image Index,tip_row,tip_col\na.png,4,5\nb.png,{cells}\n")
        with pytest.raises(UserError, match="the row of b.png, .*(lie outside|cannot be)"):
            correspondence.read_landmarks(table, films, 2)


@pytest.mark.slow
def test_correspondence_with_points_and_with_masks(place, here):
    few = ["--data", "set/films", "--films", 4]
    points = ["--table", "set/phantoms.csv", "--references", 2, "--image", 96, "--out", "c"]
    good(place, "correspondence", *few, *points)
    result = json.loads((place / "c" / "result.json").read_text())
    assert result["landmarks"] == list(phantom.LANDMARKS)
    assert result["films"] == 4 and result["image"] == 96
    assert (place / "c" / "maps.png").is_file()
    assert 0 < result["methods"]["mean place of all other films"]["distance"] < 20

    with open(place / "set" / "phantoms.csv") as file:
        rows = [f"{row['filename']},{row['mask']}" for row in csv.DictReader(file)]
    (place / "set" / "lungs.csv").write_text("\n".join(["filename,mask", *rows]) + "\n")
    masks = ["--table", "set/lungs.csv", "--references", 1, "--out", "m"]
    here("correspondence", *few, *masks, "--weights", "runs/tiny/encoder.pt")
    result = json.loads((place / "m" / "result.json").read_text())
    assert result["landmarks"] == list(correspondence.MASK_LANDMARKS)
