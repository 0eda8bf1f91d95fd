"""What the analyses share: whole films against Pillow, tables and weights, mistakes of users."""

import numpy as np
import pytest
import torch
from lab_for_tests import Films, make_here, make_place, noise  # noqa: F401 (fixtures)
from PIL import Image

from lab import common
from plumbing.checkpoint import write_json
from plumbing.launch import UserError


def test_read_whole_squeezes_films_to_squares():
    films = Films({"a": noise(0), "b": noise(1, (64, 48))})
    out, read, unreadable = common.read_whole(films, np.array([1, 0]), 32)
    assert out.shape == (2, 1, 32, 32) and out.dtype == torch.float32
    assert 0 <= out.min() and out.max() <= 1
    assert read.tolist() == [1, 0] and unreadable == {}
    for image, film in zip(out, (films[1], films[0]), strict=True):
        squeezed = np.asarray(Image.fromarray(film).resize((32, 32), Image.BICUBIC))
        assert np.array_equal((255 * image[0]).round().numpy(), squeezed)


def test_read_whole_names_the_unreadable_films():
    films = Films({"a": noise(0), "b": None, "c": noise(1)})
    images, read, unreadable = common.read_whole(films, np.array([2, 1, 0]), 8)
    assert read.tolist() == [2, 0] and unreadable == {"b": "broken"} and len(images) == 2
    images, read, unreadable = common.read_whole(films, np.array([1]), 8)
    assert read.tolist() == [] and images.shape == (0, 1, 8, 8)
    with pytest.raises(UserError, match="none of the films"):
        common.require_readable(read)


def test_a_folder_without_weights_is_one_line_that_says_what_to_give(tmp_path):
    with pytest.raises(UserError, match="holds neither last.pt nor encoder.pt: give the folder"):
        common.find_weights(str(tmp_path))


def test_rows_of_a_table_are_those_of_its_test_split(tmp_path):
    table = tmp_path / "films.csv"
    table.write_text("filename,split\nb.png, Test\nx/a.png,train\ngone.png,test\n")
    films = Films({"x/a.png": noise(0), "x/b.png": noise(1)})
    assert [(i, row["filename"]) for i, row in common.rows_of(table, films)] == [(1, "b.png")]
    assert common.named(table, films).tolist() == [1]
    assert common.named(None, films).tolist() == [0, 1]
    table.write_text("filename,split\nb.png,test\nx/a.png,Prüfung\n", encoding="utf-8")
    with pytest.raises(UserError, match="line 3: column split must say train, val, test, not"):
        common.named(table, films)
    table.write_text("filename\nb.png\nx/a.png\n")
    assert common.named(table, films).tolist() == [0, 1]
    table.write_text("filename\ngone.png\n")
    with pytest.raises(UserError, match="none of its 1 films"):
        common.named(table, films)
    table.write_text("name\nb.png\n")
    with pytest.raises(UserError, match="no column filename .*; its columns are name"):
        common.named(table, films)


def test_a_row_that_fits_two_films_and_rows_that_differ_are_refused(tmp_path):
    films = Films({"x/a.png": noise(0), "y/a.png": noise(1), "x/b.png": noise(2)})
    table = tmp_path / "films.csv"
    table.write_text("filename,label\nx/a.png,1\na.png,1\n")
    with pytest.raises(UserError, match="line 3: a.png fits both x/a.png and y/a.png"):
        common.named(table, films)
    table.write_text("filename,label,reader\nb.png,1,A\nx/b.png,0,B\n")
    assert common.named(table, films).tolist() == [2]
    with pytest.raises(UserError, match="line 3: x/b.png stands twice, and differs"):
        common.rows_of(table, films, said=lambda row: row["label"])


def test_columns_stand_below_each_other_and_may_be_missing_at_the_end():
    rows = [["", "value", "ü"], ["name", "1.0"], ["n", "23.45", "x"]]
    assert common.columns(rows).splitlines() == [
        "        value  ü",
        "  name    1.0",
        "  n     23.45  x",
    ]


def test_evenly():
    assert common.evenly(np.arange(10, 20), 4).tolist() == [10, 13, 16, 19]
    assert common.evenly(np.arange(3), 4).tolist() == [0, 1, 2]


def test_weights_are_the_newest_runs_and_last_goes_before_encoder(place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    assert str(common.find_weights(None)) == "runs/tiny/last.pt"
    assert str(common.find_weights("runs/tiny")) == "runs/tiny/last.pt"
    assert str(common.find_weights("runs/tiny/encoder.pt")) == "runs/tiny/encoder.pt"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no pre-training run"):
        common.find_weights(None)


DATA = ["--data", "set/films"]


def test_a_result_of_other_weights_or_settings_is_not_written_over(place, here):
    words = ["health", *DATA, "--films", 4, "--out", "kept"]
    here(*words)
    result = place / "kept" / "result.json"
    before = result.read_text()
    here(*words, "--weights", place / "runs" / "tiny", "--device", "cpu")  # the newest, as before
    assert result.read_text() == before
    for more, changed in (
        (["--weights", "runs/tiny/encoder.pt"], "weights .*last.pt → .*encoder.pt"),
        (["--films", 5], "films 4 → 5"),
        (["--seed", 1], "seed 0 → 1"),
        (["--data", "set"], "data .*films → .*set"),
    ):
        with pytest.raises(UserError, match=f"kept holds .*{changed}.*choose another --out$"):
            here(*words, *more)
    assert result.read_text() == before
    write_json(result, {"films": 4})
    with pytest.raises(UserError, match="kept holds a result of another program or version: "):
        here(*words)
    write_json(place / "begun" / "config.json", {"ema": 0.99})
    for name in ("health", "rcdm"):
        with pytest.raises(UserError, match="begun holds a pre-training: choose another --out$"):
            here(name, *DATA, "--out", "begun")


@pytest.mark.parametrize(
    "words, message",
    [
        (["domain", "--weights", "runs/tiny/encoder.pt", *DATA], "no predictor"),
        (["surprise", "--weights", "runs/tiny/encoder.pt", *DATA], "no predictor"),
        (["domain", "--weights", "nowhere.pt"], "no such checkpoint"),
        (["correspondence", *DATA], "--table"),
        (["correspondence", *DATA, "--table", "nowhere.csv"], "no such file"),
        (["health", "--data", "nowhere"], "no such folder"),
        (["views", *DATA, "--films", "0"], "at least one"),
        (["views", *DATA, "--image", "65"], "multiple"),
        (["views", *DATA, "--out", "set/phantoms.csv"], "--out set/phantoms.csv"),
    ],
)
def test_mistakes_are_said_in_one_line(here, words, message):
    out = [] if "--out" in words else ["--out", "x"]
    with pytest.raises(Exception, match=message) as error:
        here(*words, *out)
    assert "\n" not in str(error.value)
