"""Pictures: where things land on the page, numbers get their colours, files are whole."""

import numpy as np
from PIL import Image

from plumbing import pictures


def luminance(rgb):
    return rgb.astype(float) @ [0.2126, 0.7152, 0.0722]


def test_heat_rises_in_lightness_and_clips():
    ramp = pictures.heat(np.linspace(0, 1, 200)[None])
    assert (np.diff(luminance(ramp[0])) > -1).all() and ramp.dtype == np.uint8
    beyond = pictures.heat(np.array([[-5.0, 9.0]]), 0, 1)
    assert (beyond == pictures.heat(np.array([[0.0, 1.0]]), 0, 1)).all()
    constant = pictures.heat(np.full((2, 2), 3.0))  # is no division by zero
    assert constant.shape == (2, 2, 3)
    assert (pictures.heat(np.array([[np.nan, 1.0]]), 0, 1)[0, 0] == pictures.HEAT[0]).all()


def test_grid_puts_each_image_into_its_cell_and_leaves_gaps_white():
    red = np.zeros((40, 40, 3), np.uint8) + np.array([255, 0, 0], np.uint8)
    wide = np.full((20, 40), 90, np.uint8)
    tall = Image.new("L", (10, 40), 30)
    page = np.asarray(pictures.grid([[red, None], [wide, tall]], cell=40))
    assert page.shape == (2 * 48 + 8, 2 * 48 + 8, 3)
    assert (page[8:48, 8:48] == [255, 0, 0]).all() and (page[8:48, 56:96] == 255).all()
    assert (page[66:86, 8:48] == 90).all()  # a wide image keeps its shape, centred
    assert (page[56:65, 8:48] == 255).all()
    assert (page[56:96, 71:81] == 30).all() and (page[:8] == 255).all()


def test_grid_writes_its_words():
    blank = np.full((60, 60), 255, np.uint8)
    plain = np.asarray(pictures.grid([[blank]], cell=60))
    words = pictures.grid([[blank]], [["p = 0.01"]], ["film"], ["one"], cell=60, footnote="all")
    words = np.asarray(words)
    assert (plain == 255).all()
    assert words.shape[0] == plain.shape[0] + 22 + 18 + 20 and words.shape[1] > plain.shape[1]
    dark = words.min(2) < 100
    assert dark.sum() > 60
    assert dark[:22].any() and dark[-20:].any()  # the title above, the footnote below


def test_ticks_are_round_and_inside():
    for low, high in ((0, 1), (0.03, 0.91), (-7, 1234), (1e-5, 3e-5), (100, 101)):
        at = pictures.ticks(low, high)
        assert 2 <= len(at) <= 7
        assert low - 1e-9 * abs(low) <= at[0] and at[-1] <= high * (1 + 1e-9)
        digits = {f"{step:.0e}"[0] for step in np.diff(at)}
        assert digits <= {"1", "2", "5"} and len(digits) == 1


def test_curves_draw_each_series_where_its_values_lie():
    x = np.arange(100)
    series = {"low": (x, np.full(100, 1.0)), "high": (x, np.full(100, 100.0))}
    page = np.asarray(pictures.curves(series, "two", "step", "value")).astype(int)

    def row_of(colour):
        found = np.abs(page - np.array(colour)).sum(2) < 60
        return np.median(np.nonzero(found[:, 60:400])[0])  # left of the legend

    low = row_of((0x3B, 0x6F, 0xB6))
    high = row_of((0xD1, 0x49, 0x5B))
    top = 34
    bottom = 320 - 44
    assert page.shape == (320, 640, 3) and top <= high < top + 20
    assert abs(low - bottom) < 5  # 1 of 100 lies one percent up the axis


def test_curves_survive_nan_and_single_points():
    series = {"a": ([0, 1, 2], [1.0, float("nan"), 2.0]), "b": ([1], [1.5])}
    assert pictures.curves(series, "t", "x", "y").size == (640, 320)
    assert pictures.curves({"flat": ([3], [2.0])}, "t", "x", "y").size == (640, 320)


def test_curves_of_one_row_show_a_dot_and_of_none_an_empty_chart():
    colour = np.array([0x3B, 0x6F, 0xB6])
    nothing = ({"a": ([], [])}, {}, {"a": ([1, 2], [float("nan"), float("inf")])})
    for series, is_seen in ({"a": ([20], [1.5])}, True), *((each, False) for each in nothing):
        page = np.asarray(pictures.curves(series, "t", "x", "y")).astype(int)
        assert page.shape == (320, 640, 3)
        assert ((np.abs(page - colour).sum(2) < 60).sum() > 10) == is_seen


def test_dots_lie_where_their_values_are_in_the_colour_of_their_line():
    series = {"a": ([10, 80], [60.0, 80.0]), "b": ([10, 80], [60.0, 60.0])}
    dots = {"b": ([10, 45, 80], [70.0, 90.0, 50.0])}
    page = np.asarray(pictures.curves(series, "t", "x", "y", dots=dots)).astype(int)
    assert is_red(page, 341, 34 + 242 * 0.05 / 1.05)  # (45, 90): the middle, at the top
    assert is_red(page, 624, 276)  # (80, 50): the last and lowest
    without = np.asarray(pictures.curves(series, "t", "x", "y")).astype(int)
    assert not is_red(without, 341, 34 + 242 * 0.05 / 1.05)


def is_red(page, x, y):
    """Whether a dot of the second line's colour lies there."""
    patch = page[round(y) - 1 : round(y) + 2, round(x) - 1 : round(x) + 2]
    return (np.abs(patch - np.array((0xD1, 0x49, 0x5B))).sum(2) < 60).any()


def test_the_legend_of_rising_lines_stands_below_all_of_them():
    flat = {name: ([1, 2, 3], [50.0, 50.0, 50.0 + k]) for k, name in enumerate("abc")}
    page = np.asarray(pictures.curves(flat, "t", "x", "y", room=0.35)).astype(int)
    frame = page[40:270, 64:620]  # within the axes, below the title
    grey = np.ptp(frame, axis=2) < 30
    rows = np.nonzero((~grey).any(1))[0]
    legend = np.nonzero((~grey[:, -20:]).any(1))[0]
    lines = np.nonzero((~grey[:, :200]).any(1))[0]
    assert lines.max() < legend.max() and rows.max() == legend.max()


def test_overlay_and_boxes():
    film = np.full((90, 90), 100, np.uint8)
    half = np.asarray(pictures.overlay(film, np.zeros((3, 3, 3), np.uint8), 0.5))
    assert (np.abs(half.astype(int) - 50) <= 1).all()
    boxed = np.asarray(pictures.draw_boxes(film, [(10, 20, 30, 40)], ["#ff0000"]))
    red = (boxed == [255, 0, 0]).all(2)
    assert red[10, 20:60].all() and red[39, 20:60].all()
    assert red[10:40, 20].all() and red[10:40, 59].all()
    assert red.sum() == 2 * 40 + 2 * 30 - 4


def test_of_a_context_masked_patches_are_red_and_all_others_dark():
    image = np.full((16, 16), 240, np.uint8)
    painted = pictures.context_of(image, keep=[0, 5], masked=[3, 15], patch=4)
    patches = painted.reshape(4, 4, 4, 4, 3).swapaxes(1, 2).reshape(16, 16, 3)  # (N, pixels, 3)
    assert (patches == patches[:, :1]).all()  # one colour each
    expected = np.full((16, 3), 40)
    expected[[0, 5]] = 240
    expected[[3, 15]] = [160, 70, 70]
    assert (patches[:, 0] == expected).all()


def test_views_picture_puts_both_views_of_a_film_into_its_row():
    count, cell, gap = 2, 170, 8
    films = [np.full((170, 170), 20, np.uint8)] * count
    boxes = np.array([[(0, 0, 60, 60), (100, 100, 70, 70)]] * count)
    flips = np.array([[True, False]] * count)
    level = np.arange(2 * count).reshape(-1, 1, 1, 1) / 10  # of view 1, view 1, view 2, view 2
    batch = {
        "y": np.zeros((2 * count, 1, 32, 32)) + level,
        "x": np.zeros((2 * count, 1, 32, 32)) + level + 0.5,
        "keep": np.tile(np.arange(8), (2 * count, 1)),
        "masked": np.tile(np.arange(8, 16), (2 * count, 1)),
        "action": np.ones((2 * count, 4)),
    }
    page = np.asarray(pictures.views_picture(films, boxes, flips, batch, patch=8)).astype(int)

    def middle(row, column):  # a pixel in the cell's upper half
        y = 22 + gap + row * (cell + 18 + gap) + cell // 4
        x = gap + column * (cell + gap) + cell // 2
        return page[y, x]

    for k in range(2 * count):
        row = k % count
        column = 1 + 3 * (k // count)
        assert (middle(row, column) == round(255 * k / 10)).all()  # target
        assert (middle(row, column + 1) == round(255 * (k / 10 + 0.5))).all()  # augmented
        assert (middle(row, column + 2) == round(255 * (k / 10 + 0.5))).all()  # its context
    amber, blue = ((page == colour).all(2) for colour in ([255, 176, 0], [76, 201, 240]))
    assert amber.any() and blue.any() and np.nonzero(amber)[1].max() < gap + cell


def test_stack_and_save(tmp_path):
    red = Image.new("RGB", (30, 10), "red")
    blue = Image.new("RGB", (20, 5), "blue")
    page = pictures.stack([red, blue], gap=4)
    assert page.size == (30, 19)
    assert page.getpixel((0, 12)) == (255, 255, 255) and page.getpixel((0, 14)) == (0, 0, 255)
    pictures.save(page, tmp_path / "a.png")
    assert (np.asarray(Image.open(tmp_path / "a.png")) == np.asarray(page)).all()
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_save_keeps_a_palette(tmp_path):
    page = Image.new("RGB", (30, 10), "red").quantize(4)
    pictures.save(page, tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").mode == "P"
