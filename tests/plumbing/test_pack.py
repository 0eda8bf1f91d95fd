"""Packed files against direct reading, after kill -9 and after damage."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from films_for_tests import film, run, tree
from PIL import Image

from data import Views, open_films
from plumbing.launch import UserError
from plumbing.pack import Pack, check_and_report, pack_films


def big_tree(root, count=60, side=700):
    root.mkdir(parents=True)
    for k in range(count):
        Image.fromarray(film(k, side + k, side)).save(root / f"{k:03d}.png", compress_level=1)
    (root / "007.png").write_bytes(b"\x89PNG broken")
    return root


def test_pack_equals_direct_reading(tmp_path):
    big_tree(tmp_path / "films", 12)
    direct = open_films(tmp_path / "films", side=100)
    pack = pack_films(direct, tmp_path / "films" / "cxr.pack")
    assert pack.names == [n for n in direct.names if n != "007.png"] and len(pack) == 11
    assert pack.unreadable[0][0] == "007.png"
    opened = open_films(tmp_path / "films" / "cxr.pack")
    for i, name in enumerate(opened.names):
        assert np.array_equal(opened[i], direct[direct.names.index(name)])
        assert min(opened[i].shape) == 100
    assert opened[3].base is not None and not opened[3].flags.writeable
    assert np.shares_memory(opened[3], opened.packs[0].bytes)
    beside = open_films(tmp_path / "films")  # packed films are taken once, the bad one is a file
    assert sorted(beside.names) == sorted(direct.names) and beside.file_count == 1
    assert np.array_equal(beside[1], opened[0])
    above = open_films(tmp_path)
    assert len(above) == 12 and "11 packed films" in above.summary[-1]
    views, packed = (Views(f, 64, seed=1)[(3, 2)] for f in (direct, opened))
    assert np.array_equal(views["views"], packed["views"])


def is_running(pid):
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rsplit(")", 1)[1].split()[0] != "Z"


def has_ended(pid, seconds=120):
    """Whether a process ends within some time."""
    while is_running(pid) and seconds > 0:
        time.sleep(0.1)
        seconds -= 0.1
    return seconds > 0


@pytest.mark.slow
def test_pack_goes_on_after_kill_9(tmp_path):
    big_tree(tmp_path / "films", 120)
    words = "pack --data films --side 320 --workers 1 --out cut.pack".split()
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "data.py"), *words],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    journal = tmp_path / "cut.pack.journal"
    lines = 0
    while process.poll() is None and lines < 25:
        time.sleep(0.002)
        lines = journal.read_bytes().count(b"\n") if journal.exists() else 0
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.wait()
    assert workers and all(has_ended(pid) for pid in workers)
    assert 25 <= lines < 121 and not (tmp_path / "cut.pack").exists()
    with open(journal, "a") as file:
        file.write("320 3")  # a line that the kill has cut
    with open(tmp_path / "cut.pack.part", "ab") as file:
        file.write(b"half a film")
    other = run("pack", "--data", "films", "--side", "64", "--out", "cut.pack", cwd=tmp_path)
    assert other.returncode == 1 and "Traceback" not in other.stderr
    assert "begun from other films or another --side" in other.stderr
    done = run(*words, cwd=tmp_path)
    assert done.returncode == 0
    assert "119 films" in done.stdout and "bad, left out: 007.png" in done.stdout
    pack_films(open_films(tmp_path / "films"), tmp_path / "whole.pack")
    assert (tmp_path / "cut.pack").read_bytes() == (tmp_path / "whole.pack").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cut.pack", "films", "whole.pack"]
    assert "already there" in run(*words, cwd=tmp_path).stdout


def test_damaged_packs(tmp_path, capsys):
    pack = pack_films(open_films(big_tree(tmp_path / "films", 5)), tmp_path / "a.pack")
    content = bytearray((tmp_path / "a.pack").read_bytes())
    for name, damaged in (
        ("cut", content[:-100]),
        ("short", content[:9]),
        ("empty", b""),
        ("other", b"words" * 100),
    ):
        (tmp_path / f"{name}.pack").write_bytes(damaged)
        with pytest.raises(UserError, match="not a packed file"):
            Pack(tmp_path / f"{name}.pack")
    content[int(pack.offsets[2]) + 50] ^= 1
    (tmp_path / "b.pack").write_bytes(content)
    check_and_report(open_films(tmp_path / "b.pack"), workers=0)
    said = capsys.readouterr().out
    assert "bad: 002.png: its bytes" in said and "4 of 5 films can be read" in said


def test_pack_of_nothing_readable(tmp_path):
    tree(tmp_path / "films", ["1.png", "2.png"], b"\x89PNG junk")
    with pytest.raises(UserError, match="none of the 2 films can be read"):
        pack_films(open_films(tmp_path / "films"), tmp_path / "a.pack")
