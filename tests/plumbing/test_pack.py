"""Packed files against direct reading, after kill -9 and after damage."""

import os
import pickle
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from films_for_tests import film, run, tree
from PIL import Image
from proc import children_of, needs_proc, state_and_parent

import plumbing.pack
from data import Views, open_films
from plumbing.launch import UserError
from plumbing.pack import (
    Pack,
    UnreadableFilms,
    check_and_report,
    pack_and_report,
    pack_films,
    path_of_pack,
)


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
    return state_and_parent(pid)[0] not in ("", "Z")


def has_ended(pid, seconds=120):
    """Whether a process ends within some time."""
    while is_running(pid) and seconds > 0:
        time.sleep(0.1)
        seconds -= 0.1
    return seconds > 0


@needs_proc
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
    workers = children_of(process)
    process.kill()
    process.wait()
    assert workers and all(has_ended(pid) for pid in workers)
    assert 25 <= lines < 121 and not (tmp_path / "cut.pack").exists()
    with open(journal, "a") as file:
        file.write('[[320, "03')  # a line that the kill has cut
    with open(tmp_path / "cut.pack.part", "ab") as file:
        file.write(b"half a film")
    done = run(*words, cwd=tmp_path)
    assert done.returncode == 0
    assert "119 films" in done.stdout and "bad, left out: 007.png" in done.stdout
    pack_films(open_films(tmp_path / "films"), tmp_path / "whole.pack")
    assert (tmp_path / "cut.pack").read_bytes() == (tmp_path / "whole.pack").read_bytes()
    assert sorted(tmp_path.glob("cut.pack*")) == [tmp_path / "cut.pack"]
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
        with pytest.raises(UserError, match="not a packed file, which .* or one cut short"):
            Pack(tmp_path / f"{name}.pack")
    content[int(pack.offsets[2]) + 50] ^= 1
    (tmp_path / "b.pack").write_bytes(content)
    check_and_report(open_films(tmp_path / "b.pack"), workers=0)  # one film is no reason to stop
    said = capsys.readouterr().out
    assert "bad: 002.png: its bytes" in said and "4 of 5 films can be read" in said


def test_pack_of_nothing_readable(tmp_path):
    tree(tmp_path / "films", ["1.png", "2.png"], b"\x89PNG junk")
    with pytest.raises(UserError, match="none of the 2 films can be read"):
        pack_films(open_films(tmp_path / "films"), tmp_path / "a.pack")


# ---------------------------------------------------------------- a pack that is there already
def pack(tmp_path, **options):
    out = options.pop("out", tmp_path / "cxr.pack")
    films = open_films(tmp_path / "films", side=options.pop("side", 100), without=out, **options)
    pack_and_report(films, out, workers=0)
    return Pack(path_of_pack(out))


def equals_direct_reading(packed, root, side=100):
    direct = open_films(root, side=side)
    films = {name: direct[i] for i, name in enumerate(direct.names) if name in packed.names}
    return all(np.array_equal(packed[i], films[name]) for i, name in enumerate(packed.names))


@pytest.mark.parametrize("place", ["", "films/"])
def test_films_that_came_or_changed_after_packing(tmp_path, capsys, monkeypatch, place):
    root = big_tree(tmp_path / "films", 10, side=120)
    out = tmp_path / f"{place}cxr.pack"
    assert len(pack(tmp_path, out=out)) == 9
    pack(tmp_path, out=out)
    assert "already there" in capsys.readouterr().out.splitlines()[-1]
    for k in range(10, 60):
        Image.fromarray(film(k, 120, 130)).save(root / f"{k:03d}.png")
    Image.fromarray(film(99, 130, 120)).save(root / "002.png")
    Image.fromarray(film(98, 130, 120)).save(root / "007.png")  # it was broken
    read = []
    monkeypatch.setattr(plumbing.pack, "read_shrunk", counted(plumbing.pack.read_shrunk, read))
    packed = pack(tmp_path, out=out)
    said = capsys.readouterr().out
    assert f"{out} is made anew: 50 films are new, 2 have changed since" in said
    assert len(read) == 52  # what has not changed was not decoded again
    assert len(packed) == 60 and not packed.unreadable and equals_direct_reading(packed, root)
    whole = pack_films(open_films(root, side=100, without=out), tmp_path / "whole.pack")
    assert Path(whole.path).read_bytes() == out.read_bytes()
    pack(tmp_path, out=out)
    assert "already there" in capsys.readouterr().out.splitlines()[-1]


def test_a_film_damaged_in_the_old_pack_is_read_again(tmp_path):
    root = big_tree(tmp_path / "films", 5, side=120)
    packed = pack(tmp_path)
    content = bytearray((tmp_path / "cxr.pack").read_bytes())
    content[int(packed.offsets[2]) + 50] ^= 1
    (tmp_path / "cxr.pack").write_bytes(content)
    tree(root, ["9.png"])
    packed = pack(tmp_path)
    assert len(packed) == 6 and equals_direct_reading(packed, root)


def test_films_that_are_gone_stay_in_the_pack_or_the_user_decides(tmp_path, capsys):
    root = big_tree(tmp_path / "films", 5, side=120)
    pack(tmp_path)
    before = (tmp_path / "cxr.pack").read_bytes()
    (root / "001.png").unlink()
    pack(tmp_path)
    said = capsys.readouterr().out
    assert "warning: 1 of the 6 films in" in said and "first 001.png; they stay" in said
    tree(root, ["new.png"])
    with pytest.raises(UserError, match="1 of the 6 films .* 1 are new: choose another --out"):
        pack(tmp_path)
    with pytest.raises(UserError, match="was packed at --side 100, not 64: choose another --out"):
        pack(tmp_path, side=64)
    (root / "new.png").unlink()
    (tmp_path / "people.csv").write_text("filename,patient_id\n002.png,anna\n003.png,anna\n")
    with pytest.raises(UserError, match="1 of the 6 films .* the patients of others are new: cho"):
        pack(tmp_path, patients=tmp_path / "people.csv")
    assert (tmp_path / "cxr.pack").read_bytes() == before


def test_two_packs_of_one_film_are_refused(tmp_path):
    root = big_tree(tmp_path / "films", 5, side=120)
    pack(tmp_path)
    pack_films(open_films(root, side=64), tmp_path / "small.pack")
    with pytest.raises(UserError, match="cxr.pack and small.pack both hold 000.png, and 5 films"):
        open_films(tmp_path)
    assert len(open_films(tmp_path / "small.pack")) == 5
    (tmp_path / "small.pack").unlink()
    tree(tmp_path / "others", ["000.png"])  # another film of the same name
    pack_films(open_films(tmp_path / "others"), tmp_path / "others.pack")
    assert len(open_films(tmp_path)) == 7
    (tmp_path / "twins").mkdir()
    for k in (3, 4):  # two films of one name, size and time
        (tmp_path / f"site{k}").mkdir()
        Image.fromarray(film(k)).save(tmp_path / f"site{k}" / "000.bmp")
        os.utime(tmp_path / f"site{k}" / "000.bmp", (1e9, 1e9))
        pack_films(open_films(tmp_path / f"site{k}"), tmp_path / "twins" / f"{k}.pack")
    one, other = (Pack(tmp_path / "twins" / f"{k}.pack") for k in (3, 4))
    assert one.states == other.states
    assert len(open_films(tmp_path / "twins")) == 2


def test_a_pack_made_anew_changes_no_run_that_reads_it(tmp_path):
    """Nor does a helper process, which maps the file by itself, read others' bytes as films."""
    root = big_tree(tmp_path / "films", 5, side=120)
    opened = pack(tmp_path)
    for_helper = pickle.dumps(opened)
    films = [np.array(pickle.loads(for_helper)[i]) for i in range(len(opened))]
    Image.fromarray(film(9, 130, 120)).save(root / "0.png")
    assert pack(tmp_path).names[0] == "0.png"
    assert all(np.array_equal(opened[i], film) for i, film in enumerate(films))
    with pytest.raises(UserError, match="cxr.pack has been made anew since it was opened"):
        pickle.loads(for_helper)[0]


def test_other_patients_and_packs_of_earlier_versions(tmp_path, capsys):
    big_tree(tmp_path / "films", 4, side=120)
    pack(tmp_path)
    (tmp_path / "people.csv").write_text("filename,patient_id\n001.png,anna\n002.png,anna\n")
    found = open_films(tmp_path / "cxr.pack", patients=tmp_path / "people.csv")
    assert (
        found.patients
        == ["000.png", "anna", "anna", "003.png"]
        != Pack(found.packs[0].path).patients
    )
    packed = pack(tmp_path, patients=tmp_path / "people.csv")
    assert packed.patients == ["000.png", "anna", "anna", "003.png"]
    said = "made anew: 0 films are new, 0 have changed since; patients are others than before"
    assert said in capsys.readouterr().out
    old = ROOT / "tests" / "old" / "films.pack"
    assert set(Pack(old).states) == {None}  # nothing is known of its files: they count as the same


@pytest.mark.slow
def test_out_without_suffix_or_in_odd_places(tmp_path):
    big_tree(tmp_path / "films", 4, side=120)
    done = run("pack", "--data", "films", "--out", "cxr", "--workers", 0, cwd=tmp_path)
    assert done.returncode == 0 and "cxr.pack: 4 films" in done.stdout
    for name in ("cxr", "cxr.pack"):
        assert "4 of 4 films" in run("check", "--data", name, "--workers", 0, cwd=tmp_path).stdout
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("no folder")
    for out, line in (
        ("folder", "is a folder: give the file to write, folder/cxr.pack say"),
        ("file/cxr.pack", "file/.cxr.pack.lock cannot be written: File exists"),
        ("/proc/cxr.pack", "/proc/.cxr.pack.lock cannot be written: No such file or directory"),
    ):
        failed = run("pack", "--data", "films", "--out", out, "--workers", 0, cwd=tmp_path)
        assert failed.returncode == 1 and line in failed.stderr, failed.stderr
        assert failed.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_disk_that_fills_up_ends_in_one_line_and_packing_goes_on(tmp_path):
    resource = pytest.importorskip("resource")
    root = big_tree(tmp_path / "films", 12, side=400)
    words = ("pack", "--data", "films", "--out", "cxr.pack", "--workers", 0)

    def fill():  # no file may be larger
        resource.setrlimit(resource.RLIMIT_FSIZE, (5 * 320 * 330, 5 * 320 * 330))

    failed = run(*words, cwd=tmp_path, preexec_fn=fill)
    lines = [line for line in failed.stderr.splitlines() if line.startswith("error")]
    assert failed.returncode == 1 and "Traceback" not in failed.stderr
    assert len(lines) == 1 and "cxr.pack.part cannot be written: File too large" in lines[0]
    assert not (tmp_path / "cxr.pack").exists() and (tmp_path / "cxr.pack.part").exists()
    done = run(*words, cwd=tmp_path)
    assert done.returncode == 0 and "11 films" in done.stdout
    assert equals_direct_reading(Pack(tmp_path / "cxr.pack"), root, side=320)
    assert sorted(tmp_path.glob("cxr.pack*")) == [tmp_path / "cxr.pack"]


DAMAGE = {
    "nothing": lambda part, journal: None,
    "no part": lambda part, journal: part.unlink(),
    "no journal": lambda part, journal: journal.unlink(),
    "an empty part": lambda part, journal: part.write_bytes(b""),
    "zeros after a power cut": lambda part, journal: part.write_bytes(
        part.read_bytes()[:30_000].ljust(part.stat().st_size, b"\0")
    ),
    "a line that is none": lambda part, journal: journal.write_bytes(
        journal.read_bytes().replace(b"002.png", b"002", 1)
    ),
    "numbers": lambda part, journal: journal.write_text("7\n[1, 2]\n"),
    "of an earlier version": lambda part, journal: journal.write_text("100 5 77\n100 100 3 \n"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_beginning_costs_the_films_after_it(tmp_path, monkeypatch, what):
    """Interrupted before its index, then damaged; what can still be used is not decoded again."""
    films = open_films(big_tree(tmp_path / "films", 9, side=120), side=100)
    whole = pack_films(films, tmp_path / "whole.pack")
    out = tmp_path / "cut.pack"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(plumbing.pack, "append_index", interrupt)
        pack_films(films, out)
    DAMAGE[what](tmp_path / "cut.pack.part", tmp_path / "cut.pack.journal")
    read = []
    monkeypatch.setattr(plumbing.pack, "read_shrunk", counted(plumbing.pack.read_shrunk, read))
    pack_films(films, out)
    assert out.read_bytes() == Path(whole.path).read_bytes()
    kept = {"nothing": 9, "zeros after a power cut": 2, "a line that is none": 2}.get(what, 0)
    assert len(read) == 9 - kept


def interrupt(*_):
    raise KeyboardInterrupt


def counted(function, calls):
    """The function, which notes its first argument at every call."""
    return lambda first, *rest: calls.append(first) or function(first, *rest)


def test_films_that_change_while_packing_is_interrupted_are_packed_as_they_are_now(
    tmp_path, monkeypatch
):
    root = big_tree(tmp_path / "films", 6, side=120)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(plumbing.pack, "append_index", interrupt)
        pack_films(open_films(root, side=100), tmp_path / "cxr.pack")
    Image.fromarray(film(99, 130, 120)).save(root / "002.png")
    tree(root, ["new.png"])
    packed = pack_films(open_films(root, side=100), tmp_path / "cxr.pack")
    assert len(packed) == 7 and equals_direct_reading(packed, root)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(plumbing.pack, "append_index", interrupt)
        pack_films(open_films(root, side=100), tmp_path / "other.pack")
    other = {path: path.read_bytes() for path in tmp_path.glob("other.pack.*")}
    with pytest.raises(UserError, match="begun from other films or another --side"):
        pack_films(open_films(root, side=64), tmp_path / "other.pack")
    (root / "000.png").unlink()
    with pytest.raises(UserError, match="delete it and other.pack.journal"):
        pack_films(open_films(root, side=100), tmp_path / "other.pack")
    assert {path: path.read_bytes() for path in tmp_path.glob("other.pack.*")} == other


@pytest.mark.slow
def test_sides_and_places_that_make_no_pack(tmp_path):
    tree(tmp_path / "films", ["a.png"])
    words = ("pack", "--data", "films", "--out", "cxr.pack", "--workers", 0)
    assert "--side 1: at least 16" in run(*words, "--side", 1, cwd=tmp_path).stderr
    assert run(*words, cwd=tmp_path).returncode == 0
    again = run("pack", "--data", "cxr.pack", "--out", "cxr", "--workers", 0, cwd=tmp_path)
    assert "error: --out cxr.pack is --data itself" in again.stderr


# ---------------------------------------------------------------- how many may be unreadable
@pytest.mark.parametrize("count,bad,stops", [(15, 1, 0), (15, 2, 1), (150, 2, 1), (200, 2, 0)])
def test_one_film_or_one_percent_may_be_unreadable(tmp_path, count, bad, stops):
    root = tree(tmp_path / "films", [f"{k}.png" for k in range(count - bad)])
    tree(root, [f"bad{k}.png" for k in range(bad)], b"junk")
    films = open_films(root)
    unreadable = UnreadableFilms(count)
    with pytest.raises(UserError, match="stops once it has met so") if stops else nullcontext():
        check_and_report(films, workers=0)
    with pytest.raises(UserError, match="more than one and more") if stops else nullcontext():
        for k in range(bad):
            unreadable.note(f"bad{k}.png", "junk")
