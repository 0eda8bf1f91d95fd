"""A folder with everything that people's folders hold besides films, through the real scripts."""

import csv
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT
from films_for_tests import film, jpeg, tree

from plumbing.pack import Pack

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name == "nt", reason="such names and links are not for Windows"),
]
LATIN = os.fsdecode(b"R\xf6ntgen/\xff.png")
ODD = [LATIN, "-dash.png", "a,b.png", 'q"uote.png', "🫁 x.png", "._hidden.png", "@eaDir/x.jpg"]
RUN = "--size tiny --image 64 --patch 16 --batch 8 --epochs 2 --warmup 0 --holdout 2 --device cpu"


def script(folder, name, *words):
    """Run a script with a console that knows ASCII alone. → what it printed"""
    done = subprocess.run(
        [sys.executable, *name.split(), *map(str, words)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii:strict"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert "Traceback" not in done.stdout, done.stdout
    return done.returncode, done.stdout


def named_once(said, bad=1):
    return (
        said.count("link to itself: 1: loop.png") == 1
        and said.count("leads nowhere: 1: gone.png") == 1
        and said.count("pipe, socket or device: 1: pipe.png") == 1
        and said.count("not UTF-8: 1") == 1
        and said.count("bad.png: neither an image nor DICOM") == bad
    )


def test_every_script_reads_what_is_a_film_and_names_the_rest_once(tmp_path):
    root = tmp_path / "films"
    for k, name in enumerate([*ODD, *(f"p{k}/{k}.png" for k in range(15))]):
        tree(root, [name], jpeg(film(k, 80, 80)))
    (root / "loop.png").symlink_to("loop.png")
    (root / "gone.png").symlink_to("nowhere.png")
    os.mkfifo(root / "pipe.png")
    (root / "bad.png").write_bytes(b"junk")  # one of 21: no reason to stop

    code, said = script(tmp_path, f"{ROOT}/data.py check", "--data", "films", "--workers", 1)
    assert code == 0 and "20 of 21 films can be read" in said and named_once(said), said
    code, said = script(tmp_path, f"{ROOT}/data.py pack", "--data", "films", "--workers", 1)
    assert code == 0 and named_once(said), said
    assert LATIN in Pack(tmp_path / "cxr.pack").names

    for data in ("films", "cxr.pack"):
        out = f"run_{data}"
        words = ["--data", data, "--out", out, "--workers", 1, *RUN.split()]
        code, said = script(tmp_path, f"{ROOT}/pretrain.py", *words)
        assert code == 0 and (tmp_path / out / "result.json").is_file(), said
        assert data == "cxr.pack" or named_once(said), said

    encoder = tmp_path / "run_films" / "encoder.pt"
    words = ["--data", "films", "--weights", encoder, "--out", "features", "--device", "cpu"]
    code, said = script(tmp_path, "-m lab.features", *words)
    assert code == 0 and named_once(said), said
    with open(tmp_path / "features" / "features.csv", encoding="utf-8", newline="") as file:
        names = [row[0] for row in csv.reader(file)][1:]
    spelt = LATIN.encode(errors="backslashreplace").decode()
    assert len(names) == 20 and spelt in names and 'q"uote.png' in names and "a,b.png" in names
    result = json.loads((tmp_path / "features" / "result.json").read_text())
    assert list(result["unreadable"]) == ["bad.png"]

    rows = [["filename", "label", "split"]]
    films = sorted([*ODD[1:5], *(f"p{k}/{k}.png" for k in range(15))])
    for k, name in enumerate(films):
        rows.append([name, ["normal", "mass"][k % 2], ["train", "val", "test"][k // 2 % 3]])
    with open(tmp_path / "labels.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    words = ["--data", "films", "--labels", "labels.csv", "--weights", encoder, "--epochs", 1]
    code, said = script(
        tmp_path, f"{ROOT}/finetune.py --task csv", *words, "--out", "tuned", "--device", "cpu"
    )
    assert code == 0 and named_once(said, bad=0), said
