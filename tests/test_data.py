"""Finding, batching and cropping of films, against hand-made trees of every layout and slow re-statements."""

import gzip
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REAL
from films_for_tests import TINY, film, needs_real, run, tree

from augment import crop, sample_boxes
from data import Batches, Views, open_films
from plumbing import folder, keys
from plumbing.film import UnreadableFilm
from plumbing.launch import UserError


# ------------------------------------------------------------------------------------------------ finding
def test_any_folder(tmp_path):
    tree(
        tmp_path,
        ["a/b/c/1.png", "a/2.JPG", "3.jfif", "CR.1.2.840.113564.99", "noname", "å ü/4.webp"],
    )
    tree(
        tmp_path,
        [
            ".hidden.png",
            ".git/5.png",
            "index.html",
            "labels.csv",
            "a/README.txt",
            "a/notes.json",
            "DICOMDIR",
        ],
    )
    tree(tmp_path, ["LICENSE", "1.2.3"], b"words")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    found = open_films(tmp_path)
    assert (
        found.names
        == ["3.jfif", "CR.1.2.840.113564.99", "a/2.JPG", "a/b/c/1.png", "noname", "å ü/4.webp"]
        == found.patients
    )
    assert (
        found[0].shape == (40, 40)
        and len(found) == 6
        and "films: 6 in 4 folders" in found.summary[0]
    )
    assert open_films(tmp_path, side=16)[3].shape == (16, 16)
    (tmp_path / "people.csv").write_text(
        "filename,patient_id\nb/c/1.png,anna\nsomewhere/else/3.jfif,ben\nx/1.png,nobody\n"
    )
    assert open_films(tmp_path, patients=tmp_path / "people.csv").patients == [
        "ben",
        *found.names[1:3],
        "anna",
        *found.names[4:],
    ]


def test_nothing_to_open(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        open_films(tmp_path / "gone")
    tree(tmp_path, ["labels.csv", "LICENSE"], b"words")
    with pytest.raises(UserError, match="no films.*2 files"):
        open_films(tmp_path)


MIMIC_IDS = ["02aa804e-bde0afdd-112c0b34-7bc16630-4e38401%d" % k for k in range(9)]
MIMIC_BAD_ID = "0518c887-b80608ca-830de2d5-89acf0e2-bd3ec900"
MIMIC_VIEWS = [
    ("AP", "train"),
    ("PA", "train"),
    ("LATERAL", "train"),
    ("AP", "validate"),
    ("PA", "test"),
    ("AP AXIAL", "train"),
    ("", "train"),
    ("PA LLD", "train"),
    ("AP", "train"),
]


def mimic_tree(root, folder="", zipped=True, absent=()):
    rows = [(MIMIC_BAD_ID, 10000032, "AP", "train")] + [
        (i, 10000032 + k // 2, *v) for k, (i, v) in enumerate(zip(MIMIC_IDS, MIMIC_VIEWS))
    ]
    metadata = (
        "dicom_id,subject_id,study_id,PerformedProcedureStepDescription,ViewPosition,Rows,Columns,StudyDate\n"
        + "".join(
            f'{i},{p},50414267,"CHEST (PA, LAT)",{view},3056,2544,21800506\n'
            for i, p, view, _ in rows
        )
    )
    split = "dicom_id,study_id,subject_id,split\n" + "".join(
        f"{i},50414267,{p},{part}\n" for i, p, _, part in rows
    )
    base = root / folder
    base.mkdir(parents=True, exist_ok=True)
    for kind, text in (("metadata", metadata), ("split", split)):
        name = f"mimic-cxr-2.0.0-{kind}.csv"
        (base / f"{name}.gz").write_bytes(gzip.compress(text.encode())) if zipped else (
            base / name
        ).write_text(text)
    tree(
        base,
        [
            "index.html",
            "files/index.html",
            "files/p10/index.html",
            "SHA256SUMS.txt",
            "README",
            "IMAGE_FILENAMES",
        ],
        b"<html>",
    )
    tree(base, [f"files/p10/p{p}/s50414267/{i}.jpg" for i, p, _, _ in rows if i not in absent])
    return base


@pytest.mark.parametrize(
    "folder,zipped", [("", True), ("physionet.org/files/mimic-cxr-jpg/2.1.0", False)]
)
def test_mimic(tmp_path, folder, zipped):
    mimic_tree(tmp_path, folder, zipped)
    found = open_films(tmp_path)
    assert [Path(n).stem for n in found.names] == [MIMIC_IDS[k] for k in (0, 1, 8)]
    assert found.patients == ["mimic:10000032", "mimic:10000032", "mimic:10000036"]
    assert "MIMIC-CXR-JPG: 3 frontal training films of 2 patients; 7 left out" in found.summary[0]
    assert [Path(n).stem for n in open_films(tmp_path, mimic_all=True).names] == [
        MIMIC_IDS[k] for k in (0, 1, 3, 4, 8)
    ]


def test_mimic_bad_list():
    assert (
        len(folder.MIMIC_BAD) == 23
        and MIMIC_BAD_ID in folder.MIMIC_BAD
        and all(len(i) == 44 for i in folder.MIMIC_BAD)
    )


def test_lists_without_films_or_partners(tmp_path):
    base = mimic_tree(tmp_path, absent=MIMIC_IDS[:1])
    assert any(
        "warning: MIMIC-CXR-JPG: 1 of 3 listed films not there, first 02aa804e" in line
        for line in open_films(tmp_path).summary
    )
    for image in base.rglob("*.jpg"):
        image.unlink()
    with pytest.raises(
        UserError, match=r"none of the 3 films in its lists.*expected mimic-cxr-jpg/\{files/p10"
    ):
        open_films(tmp_path)
    (base / "mimic-cxr-2.0.0-split.csv.gz").unlink()
    with pytest.raises(UserError, match="without its mimic-cxr-2.0.0-split"):
        open_films(tmp_path)
    (base / "mimic-cxr-2.0.0-metadata.csv.gz").write_bytes(b"\x1f\x8bjunk")
    with pytest.raises(UserError, match="cannot be read as a table"):
        open_films(tmp_path, mimic_all=True)


CHEXPERT_ROWS = [
    (f"train/{film}.jpg", view)
    for film, view in (
        ("patient00001/study1/view1_frontal", "Frontal,AP"),
        ("patient00002/study2/view1_frontal", "Frontal,LL"),
        ("patient00002/study1/view2_lateral", "Lateral,"),
        ("patient43018/study1/view1_frontal", "Frontal,PA"),
    )
]
CHEXPERT_HEADER = "Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Edema\n"


def chexpert_tree(root, variant):
    """The five layouts of DATASETS.md, section 2."""
    valid = ["valid/patient64541/study1/view1_frontal.jpg"]
    films = [name for name, _ in CHEXPERT_ROWS]
    prefix = "CheXpert-v1.0-small/" if variant in ("small", "kaggle") else "CheXpert-v1.0/"
    base = (
        root
        / {
            "small": "CheXpert-v1.0-small",
            "full": "CheXpert-v1.0",
            "kaggle": ".",
            "batches": "CheXpert-v1.0 batch 1 (validate & csv)",
            "test set": "CheXpert",
        }[variant]
    )
    base.mkdir(parents=True, exist_ok=True)
    if variant == "test set":
        tree(
            base,
            [
                "test/patient64741/study1/view1_frontal.jpg",
                "val/patient64541/study1/view1_frontal.jpg",
            ],
        )
        for part in ("test", "val"):
            (base / f"{part}_labels.csv").write_text(
                f"Path,No Finding\n{part}/patient64741/study1/view1_frontal.jpg,0.0\n"
            )
        return
    (base / "train.csv").write_text(
        CHEXPERT_HEADER
        + "".join(f"{prefix}{n},Female,68,{view},1.0,\n" for n, view in CHEXPERT_ROWS)
    )
    (base / "valid.csv").write_text(
        CHEXPERT_HEADER + f"{prefix}{valid[0]},Male,73,Frontal,AP,0.0,1.0\n"
    )
    (base / "train_cheXbert.csv").write_text(CHEXPERT_HEADER)
    if variant == "batches":
        batch = lambda name: (
            "CheXpert-v1.0 batch 4 (train 3)"
            if "43018" in name
            else "CheXpert-v1.0 batch 2 (train 1)"
        )
        tree(root, [f"{batch(name)}/{name.removeprefix('train/')}" for name in films])
    else:
        tree(base, films)
    tree(base, valid)


@pytest.mark.parametrize("variant", ["small", "full", "kaggle", "batches"])
@pytest.mark.parametrize("above", ["", "sets/stanford"])
def test_chexpert(tmp_path, variant, above):
    chexpert_tree(tmp_path / above, variant)
    found = open_films(tmp_path)
    assert sorted("/".join(n.split("/")[-3:]) for n in found.names) == [
        "patient00001/study1/view1_frontal.jpg",
        "patient00002/study2/view1_frontal.jpg",
        "patient43018/study1/view1_frontal.jpg",
    ]
    assert found.patients == [
        "chexpert:patient00001",
        "chexpert:patient00002",
        "chexpert:patient43018",
    ]
    assert "CheXpert: 3 frontal training films of 3 patients; 2 left out" in found.summary[0]


def test_chexpert_test_set_is_never_trained_on(tmp_path):
    chexpert_tree(tmp_path, "test set")
    with pytest.raises(
        UserError, match="no films to train on.*CheXpert: 0 frontal training films.*2 left out"
    ):
        open_films(tmp_path)
    tree(tmp_path, ["mine/1.png"])
    assert open_films(tmp_path).names == ["mine/1.png"]


def test_a_strangers_train_csv_is_ignored(tmp_path):
    tree(tmp_path, ["1.png"])
    (tmp_path / "train.csv").write_text("filename,label\n1.png,0\n")
    assert open_films(tmp_path).names == ["1.png"]


def nih_tree(root, box=False, old=False, table=True, listed=True):
    names = ["00000001_000.png", "00000001_001.png", "00000002_000.png", "00000003_000.png"]
    if table:
        header = (
            "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
            "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
        )
        text = (
            header
            + (",\n" if old else "\n")
            + "".join(
                f"{n},Cardiomegaly|Emphysema,1,{int(n[:8])},058Y,M,PA,2894,2729,0.143,0.143{',' if old else ''}\n"
                for n in names
            )
        )
        root.mkdir(parents=True, exist_ok=True)
        (root / ("Data_Entry_2017.csv" if old else "Data_Entry_2017_v2020.csv")).write_text(text)
    tree(
        root,
        [
            f"images/{n}" if box else f"images_00{k + 1}/images/{n}"
            for k, n in enumerate([*names, "00000009_000.png"])
        ],
    )
    if listed:
        (root / "train_val_list.txt").write_text(
            "\n".join(names[:3])
        )  # no newline at the end, as distributed
    (root / "test_list.txt").write_text(names[3])


@pytest.mark.parametrize(
    "box,old,table", [(False, False, True), (True, True, True), (True, False, False)]
)
def test_nih(tmp_path, box, old, table):
    nih_tree(tmp_path, box, old, table)
    found = open_films(tmp_path)
    assert [Path(n).name for n in found.names] == [
        "00000001_000.png",
        "00000001_001.png",
        "00000002_000.png",
    ]
    assert found.patients == ["nih:00000001", "nih:00000001", "nih:00000002"]
    assert "ChestX-ray14: 3 frontal training films of 2 patients; 2 left out" in found.summary[0]


def test_nih_without_its_list(tmp_path):
    nih_tree(tmp_path, listed=False)
    with pytest.raises(UserError, match="ChestX-ray14 without train_val_list.txt"):
        open_films(tmp_path)


def test_a_set_without_its_lists_is_warned_of(tmp_path):
    nih_tree(tmp_path / "nih")
    found = open_films(tmp_path / "nih" / "images_001")
    assert len(found) == 1 and found.summary[1].startswith(
        "warning: 1 films are named as in ChestX-ray14, whose lists are not here"
    )


def test_all_sets_in_one_folder_beside_others(tmp_path):
    mimic_tree(tmp_path, "a/mimic")
    chexpert_tree(tmp_path / "b", "batches")
    chexpert_tree(tmp_path / "b2", "small")  # the same films again, smaller
    nih_tree(tmp_path / "c")
    tree(
        tmp_path,
        ["own/1.png", "own/2.png", "copies/00000003_000.png", f"copies/{MIMIC_IDS[3]}.jpg"],
    )
    found = open_films(tmp_path)
    assert len(found) == 3 + 3 + 3 + 2 and [
        n for n in found.names if n.startswith(("own", "copies"))
    ] == ["own/1.png", "own/2.png"]
    assert len(found.summary) == 4 and any(
        "3 second copies left out" in line for line in found.summary
    )


def test_index_is_cached_until_something_changes(tmp_path, monkeypatch):
    films, cache = tmp_path / "films", tmp_path / "run"
    nih_tree(films)
    tree(films, ["own/deep/er/1.png"])
    looked = []
    monkeypatch.setattr(
        folder, "walk", lambda root, walk=folder.walk: looked.append(root) or walk(root)
    )
    names = lambda **options: [Path(n).name for n in open_films(films, cache, **options).names]
    first = names()
    assert first == names() and len(looked) == 1
    assert open_films(films, cache).patients == open_films(films).patients
    tree(films, ["own/deep/er/2.png"])
    assert names() == [*first, "2.png"] == names()
    (films / "own/deep/er/1.png").unlink()
    assert names() == [*first[:-1], "2.png"]
    (films / "train_val_list.txt").write_text("00000002_000.png")
    assert names() == ["00000002_000.png", "2.png"]
    looked.clear()
    names(mimic_all=True)
    (cache / "films.json").write_text("{")
    assert names(mimic_all=True) == ["00000002_000.png", "2.png"] and len(looked) == 1
    assert os.listdir(cache) == ["films.json"]


# ------------------------------------------------------------------------------------------------ the commands
def test_commands_and_their_errors(tmp_path):
    tree(tmp_path / "films", ["a/1.png", "b/2.jpg"])
    tree(tmp_path / "films", ["b/3.jpg"], TINY[: len(TINY) // 2])
    result = run("check", "--data", tmp_path / "films", "--workers", 2)
    assert (
        result.returncode == 0
        and "films: 3 in 2 folders" in result.stdout
        and "2 of 3 films can be read" in result.stdout
    )
    assert "bad: b/3.jpg: image file is truncated" in result.stdout
    for words, line in (
        (["check", "--data", tmp_path / "no"], "no such folder"),
        (["check", "--dta", "x"], "unrecognized arguments"),
        (["chek", "--data", "x"], "say what to do"),
        ([], "say what to do"),
    ):
        result = run(*words)
        assert (
            result.returncode == 1
            and line in result.stderr
            and result.stderr.count("\n") == 1
            and not result.stdout
        )


# ------------------------------------------------------------------------------------------------ batches
def slow_batches(n, batch, seed, steps):
    """Every step's global batch, written out: the epochs' permutations, each cut to whole batches, one after the other."""
    places = []
    for epoch in range(steps):
        order = np.random.default_rng((keys.ORDER, seed, epoch)).permutation(n).tolist()
        places += [(epoch, i) for i in order[: n - n % batch]]
    return [places[s * batch : (s + 1) * batch] for s in range(steps)]


@pytest.mark.parametrize("world,micro", [(1, 12), (1, 3), (2, 6), (2, 2), (4, 1), (3, 4)])
@pytest.mark.parametrize("start", [0, 1, 7])
def test_batches_are_the_same_for_every_team(world, micro, start):
    reference = slow_batches(50, 12, seed=5, steps=11)
    shares = [
        list(Batches(50, 12, micro, rank, world, 5, start_step=start, steps=11))
        for rank in range(world)
    ]
    per_step = 12 // world // micro
    assert all(
        len(s) == per_step * (11 - start) == len(Batches(50, 12, micro, 0, world, 5, start, 11))
        for s in shares
    )
    for step in range(start, 11):
        micros = [
            m
            for share in shares
            for m in share[(step - start) * per_step : (step - start + 1) * per_step]
        ]
        assert (
            all(len(m) == micro for m in micros)
            and [item for m in micros for item in m] == reference[step]
        )


def test_batches_cover_an_epoch_and_differ_between_epochs():
    items = [item for m in Batches(48, 12, 12, 0, 1, 0, steps=8) for item in m]
    assert (
        sorted(i for e, i in items if e == 0)
        == sorted(i for e, i in items if e == 1)
        == list(range(48))
    )
    assert [i for e, i in items if e == 0] != [i for e, i in items if e == 1]
    assert list(Batches(48, 12, 12, 0, 1, 1, steps=1)) != list(
        Batches(48, 12, 12, 0, 1, 0, steps=1)
    )
    assert len(list(Batches(50, 12, 12, 0, 1, 0))) == 4  # without `steps`: one epoch


def test_batches_that_cannot_be():
    with pytest.raises(UserError, match="11 films are fewer than one batch of 12"):
        Batches(11, 12, 12, 0, 1, 0, steps=1)
    with pytest.raises(UserError, match="not a multiple"):
        Batches(100, 12, 5, 0, 2, 0, steps=1)


# ------------------------------------------------------------------------------------------------ views
class Memory:
    """Films in memory, some of them bad."""

    def __init__(self, count, bad=()):
        self.names, self.bad = [f"{k}.png" for k in range(count)], bad

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        if i in self.bad:
            raise UnreadableFilm("broken")
        return film(i, 90 + i % 7, 100)


def test_views_are_the_keyed_crops():
    item = Views(Memory(9), 32, seed=4)[(2, 5)]
    boxes, flips = sample_boxes(np.random.default_rng((keys.VIEWS, 4, 2, 5)), 95, 100)
    assert item["views"].shape == (2, 32, 32) and item["views"].dtype == np.uint8
    assert item["boxes"].dtype == np.float32 and item["unreadable"] == item["reason"] == ""
    for k in range(2):
        assert np.array_equal(
            item["views"][k], crop(film(5, 95, 100), boxes[k], 32, flips[k])
        ) and np.allclose(item["boxes"][k], boxes[k])
    others = [
        Views(Memory(9), 32, seed=s)[(e, i)]["boxes"]
        for s, e, i in ((4, 2, 5), (5, 2, 5), (4, 3, 5), (4, 2, 6))
    ]
    assert np.array_equal(others[0], item["boxes"]) and not any(
        np.array_equal(others[0], o) for o in others[1:]
    )


def test_views_do_not_depend_on_workers_or_ranks():
    views = Views(Memory(40, bad=(7, 8)), 24, seed=1)

    def whole(workers, micro, world):
        samplers = [
            Batches(40, 8, micro, rank, world, seed=3, start_step=2, steps=7)
            for rank in range(world)
        ]
        parts = [
            list(torch.utils.data.DataLoader(views, batch_sampler=s, num_workers=workers))
            for s in samplers
        ]
        per = 8 // world // micro
        rows = [parts[r][s * per + a] for s in range(5) for r in range(world) for a in range(per)]
        unreadable = [name for row in rows for name in row.pop("unreadable")]
        reasons = [reason for row in rows for reason in row.pop("reason")]
        return {key: torch.cat([row[key] for row in rows]) for key in rows[0]}, unreadable, reasons

    reference, unreadable, reasons = whole(0, 8, 1)
    assert reference["views"].shape == (40, 2, 24, 24)
    assert set(zip(unreadable, reasons, strict=True)) == {
        ("", ""),
        ("7.png", "broken"),
        ("8.png", "broken"),
    }
    for other, *names_and_reasons in (whole(2, 8, 1), whole(1, 2, 1), whole(0, 4, 2)):
        assert all(torch.equal(reference[key], other[key]) for key in reference)
        assert names_and_reasons == [unreadable, reasons]


def test_a_bad_film_gives_way_to_the_next():
    views = Views(Memory(10, bad=(3, 4, 9)), 24, seed=1)
    assert [views[(0, i)]["unreadable"] for i in (3, 4, 5)] == ["3.png", "4.png", ""]
    assert np.array_equal(views.read(3)[0], film(5, 95, 100)) and np.array_equal(
        views.read(9)[0], film(0, 90, 100)
    )
    some = Views(Memory(10, bad=(3, 4, 9)), 24, seed=1, subset=[9, 3, 8])
    assert (
        len(some) == 3
        and some[(0, 1)]["unreadable"] == "3.png"
        and np.array_equal(some.read(0)[0], film(8, 91, 100))
    )
    with pytest.raises(UserError, match="10 films in a row cannot be read, from 0.png on .broken."):
        Views(Memory(10, bad=range(10)), 24, seed=1)[(0, 0)]


@needs_real
def test_real_films_are_found_and_read():
    found = open_films(REAL / "films", side=160)
    assert len(found) == 2050
    sample = [found[i] for i in range(0, 2050, 200)]
    assert all(min(f.shape) == 160 and f.std() > 5 for f in sample)
