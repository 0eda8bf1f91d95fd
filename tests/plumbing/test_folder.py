"""Finding films below a folder, against hand-made trees of every layout of the three sets."""

import gzip
import os
import socket
from pathlib import Path

import pytest
from films_for_tests import tree

from data import open_films
from plumbing import film, folder
from plumbing.folder import Index
from plumbing.launch import UserError

MIMIC_IDS = [f"02aa804e-bde0afdd-112c0b34-7bc16630-4e38401{k}" for k in range(9)]
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
    rows = [(MIMIC_BAD_ID, 10000032, "AP", "train")]
    for k, (view, part) in enumerate(MIMIC_VIEWS):
        rows.append((MIMIC_IDS[k], 10000032 + k // 2, view, part))
    metadata = (
        "dicom_id,subject_id,study_id,PerformedProcedureStepDescription,ViewPosition,Rows,Columns,"
        "StudyDate\n"
    )
    split = "dicom_id,study_id,subject_id,split\n"
    for film_id, patient, view, part in rows:
        metadata += f'{film_id},{patient},50414267,"CHEST (PA, LAT)",{view},3056,2544,21800506\n'
        split += f"{film_id},50414267,{patient},{part}\n"
    base = root / folder
    base.mkdir(parents=True, exist_ok=True)
    for kind, text in (("metadata", metadata), ("split", split)):
        name = f"mimic-cxr-2.0.0-{kind}.csv"
        if zipped:
            (base / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
        else:
            (base / name).write_text(text)
    tree(
        base,
        ["index.html", "files/p10/index.html", "SHA256SUMS.txt", "README", "IMAGE_FILENAMES"],
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
    ("train/patient00001/study1/view1_frontal.jpg", "Frontal,AP"),
    ("train/patient00002/study2/view1_frontal.jpg", "Frontal,LL"),
    ("train/patient00002/study1/view2_lateral.jpg", "Lateral,"),
    ("train/patient43018/study1/view1_frontal.jpg", "Frontal,PA"),
]
CHEXPERT_FOLDERS = {
    "small": "CheXpert-v1.0-small",
    "full": "CheXpert-v1.0",
    "kaggle": ".",
    "batches": "CheXpert-v1.0 batch 1 (validate & csv)",
    "test set": "CheXpert",
}
CHEXPERT_HEADER = "Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Edema\n"


def chexpert_tree(root, variant):
    """CheXpert as it is distributed in five ways."""
    valid = ["valid/patient64541/study1/view1_frontal.jpg"]
    films = [name for name, _ in CHEXPERT_ROWS]
    prefix = "CheXpert-v1.0-small/" if variant in ("small", "kaggle") else "CheXpert-v1.0/"
    base = root / CHEXPERT_FOLDERS[variant]
    base.mkdir(parents=True, exist_ok=True)
    if variant == "test set":
        tree(base, ["test/patient64741/study1/view1_frontal.jpg"])
        tree(base, ["val/patient64541/study1/view1_frontal.jpg"])
        for part in ("test", "val"):
            (base / f"{part}_labels.csv").write_text(
                f"Path,No Finding\n{part}/patient64741/study1/view1_frontal.jpg,0.0\n"
            )
        return
    rows = [f"{prefix}{name},Female,68,{view},1.0,\n" for name, view in CHEXPERT_ROWS]
    (base / "train.csv").write_text(CHEXPERT_HEADER + "".join(rows))
    row = f"{prefix}{valid[0]},Male,73,Frontal,AP,0.0,1.0\n"
    (base / "valid.csv").write_text(CHEXPERT_HEADER + row)
    (base / "train_cheXbert.csv").write_text(CHEXPERT_HEADER)
    if variant == "batches":
        for name in films:
            batch = "batch 4 (train 3)" if "43018" in name else "batch 2 (train 1)"
            tree(root, [f"CheXpert-v1.0 {batch}/{name.removeprefix('train/')}"])
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
        end = ",\n" if old else "\n"  # the first version's lines end with a comma
        text = (
            "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,"
            f"View Position,OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]{end}"
        )
        for name in names:
            text += f"{name},Cardiomegaly|Emphysema,1,{int(name[:8])},058Y,M,PA,"
            text += f"2894,2729,0.143,0.143{end}"
        root.mkdir(parents=True, exist_ok=True)
        (root / ("Data_Entry_2017.csv" if old else "Data_Entry_2017_v2020.csv")).write_text(text)
    for k, name in enumerate([*names, "00000009_000.png"]):
        tree(root, [f"images/{name}" if box else f"images_00{k + 1}/images/{name}"])
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


def test_films_are_found_by_name(tmp_path):
    root = tree(tmp_path / "data", ["a.png", "sub/b.png"])
    index = Index(root)
    assert index.names == ["a.png", "sub/b.png"] and index.find(["a.png"]) == [root / "a.png"]
    assert index.find(["b"]) == [root / "sub" / "b.png"]
    tree(root, ["other/b.png"])
    with pytest.raises(UserError, match="one film name, several files"):
        Index(root).find(["b.png"])
    with pytest.raises(UserError, match="2 of the 3 films named by the lists are not there"):
        Index(root).find(["a.png", "c.png", "d"])
    assert Index(root).find(["other/b.png"], depth=2) == [root / "other" / "b.png"]


def test_every_suffix_that_is_pretrained_on_is_found_by_name(tmp_path):
    names = [f"{suffix[1:]}-1.2{suffix}" for suffix in film.SUFFIXES]
    everything = [*names, "noname", "masks/noname.png"]
    tree(tmp_path, everything)
    assert open_films(tmp_path).names == sorted(everything)
    index = Index(tmp_path)
    assert index.find(names) == index.find([os.path.splitext(name)[0] for name in names])
    assert index.find(["noname"]) == [tmp_path / "noname"]


# ---------------------------------------------------------------- what is no film
posix = pytest.mark.skipif(os.name == "nt", reason="such names and links are not for Windows")


@posix
def test_odd_entries_are_skipped_or_read_and_named_once(tmp_path):
    odd = ["a,b.png", 'q"uote.png', "new\nline.png", "-dash.png", "🫁 x.png", " space .png"]
    latin = os.fsdecode(b"R\xf6ntgen/\xff.png")
    root = tree(tmp_path / "films", [*odd, latin])
    tree(root, ["._1.png", ".DS_Store", "__MACOSX/._1.png", "@eaDir/1.png/SYNO.jpg", ".git/2.png"])
    tree(root, ["Thumbs.db", "desktop.ini"], b"words")
    (root / "loop.png").symlink_to("loop.png")
    (root / "loop").symlink_to("loop")
    (root / "dangling.png").symlink_to("gone.png")
    (root / "up").symlink_to(".")
    os.mkfifo(root / "pipe.png")
    os.mkfifo(root / "pipe")
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(root / "socket.png"))
    found = open_films(root)
    assert found.names == sorted([*odd, latin])
    assert all(found[i].shape == (40, 40) for i in range(len(found)))
    said = "\n".join(found.summary)
    for line in (
        "skipped, link to itself: 2: loop, loop.png",
        "skipped, link that leads nowhere: 1: dangling.png",
        "skipped, pipe, socket or device: 3: pipe, pipe.png, socket.png",
        f"read, though their names are not UTF-8: 1: {latin}",
    ):
        assert said.count(line) == 1, said


@posix
def test_a_link_to_a_film_that_is_here_is_no_second_film(tmp_path):
    """Held out under one name, it would be trained on under the other."""
    root = tree(tmp_path / "set", ["real/a.png", "real/b.png"])
    outside = tree(tmp_path / "elsewhere", ["c.png", "more/d.png"])
    for name, target in (
        ("links/x.png", "../real/a.png"),
        ("links/of_link.png", "x.png"),
        ("links/c.png", outside / "c.png"),
        ("links/c_again.png", outside / "c.png"),
        ("more", outside / "more"),
        ("links/d.png", outside / "more" / "d.png"),
    ):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).symlink_to(target)
    (tmp_path / "way").symlink_to(root)
    for way in (root, tmp_path / "way"):
        films = open_films(way)
        assert films.names == ["links/c.png", "more/d.png", "real/a.png", "real/b.png"]
        assert films.links == {
            "links/c_again.png": "links/c.png",
            "links/d.png": "more/d.png",
            "links/of_link.png": "real/a.png",
            "links/x.png": "real/a.png",
        }
        assert "4 links left out" in films.summary[-1]
    assert "links/x.png" in Index(root).films  # a table of one's own may name it


@posix
def test_a_folder_or_file_that_refuses_to_be_read_is_named(tmp_path, monkeypatch):
    root = tree(tmp_path / "films", ["a/1.png", "b/2.png", "noname"])
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    monkeypatch.setattr(
        folder, "looks_like_film", lambda path: path.endswith(".png") or open("/nowhere/at/all")
    )
    index = Index(root)
    assert index.films == ["a/1.png"]
    assert "skipped, folder cannot be read: Permission denied: 1: b" in index.notes
    assert "skipped, cannot be looked at: No such file or directory: 1: noname" in index.notes
