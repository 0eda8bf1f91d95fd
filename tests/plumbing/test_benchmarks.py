"""Every downstream set as a miniature tree, laid out as it is distributed; the readers' labels are compared with what was drawn."""

from pathlib import Path

import numpy as np
import pytest
from conftest import REAL
from PIL import Image
from sklearn.model_selection import train_test_split

from plumbing import benchmarks
from plumbing.film import decode_rle, encode_rle, read_film, read_mask
from plumbing.folder import Index
from plumbing.launch import UserError
from plumbing.splits import Example, Splits, class_warnings, draw_few
from plumbing.table import read_list, without_suffix


def mask_of(example):
    return read_mask(example.mask, example.path)


def picture(path, mode="L", side=16, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    gray = Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (side, side), dtype=np.uint8)
    )
    if mode == "P":  # reversed palette: the indices are not the grey values
        image = Image.fromarray(255 - np.asarray(gray)).convert("P")
        image.putpalette([v for k in range(256) for v in [255 - k] * 3])
    else:
        image = gray.convert(mode)
    image.save(path)
    return np.asarray(gray)


def dicom(path, pixels, bits=8, photometric="MONOCHROME2", window=None):
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

    path.parent.mkdir(parents=True, exist_ok=True)
    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = (
        ExplicitVRLittleEndian,
        SecondaryCaptureImageStorage,
        generate_uid(),
    )
    film = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    film.Rows, film.Columns = pixels.shape
    film.SamplesPerPixel, film.PhotometricInterpretation, film.PixelRepresentation = (
        1,
        photometric,
        0,
    )
    film.BitsAllocated, film.BitsStored, film.HighBit = (16 if bits > 8 else 8), bits, bits - 1
    if window:
        film.WindowCenter, film.WindowWidth = window
    film.PixelData = pixels.astype(np.uint16 if bits > 8 else np.uint8).tobytes()
    film.save_as(path, enforce_file_format=True)


def labels_of(splits):
    return {
        split: {c.path.name: c.target for c in getattr(splits, split)}
        for split in ("train", "val", "test")
    }


def noise(seed=0, side=16):
    return np.random.default_rng(seed).integers(0, 256, (side, side))


# ---------------------------------------------------------------- Shenzhen


def shenzhen_tree(root, count=20):
    names = [f"CHNCXR_{k:04d}_{int(k > count // 2)}.png" for k in range(1, count + 1)]
    grays = [
        picture(root / "ChinaSet_AllFiles" / "CXR_png" / n, ["P", "RGB"][k % 2], seed=k)
        for k, n in enumerate(names)
    ]
    picture(
        root / "mask" / "mask" / "CHNCXR_0001_0_mask.png"
    )  # the lung masks' zip, unpacked beside it
    return names, grays


def test_shenzhen_lists_with_their_misspelt_names(tmp_path):
    names, grays = shenzhen_tree(tmp_path)
    parts = {
        "train": names[:8] + names[10:18],
        "valid": [names[8], names[18]],
        "test": [names[9], names[19]],
    }
    for split, members in parts.items():
        (tmp_path / f"ShenzenCXR_{split}_data.txt").write_text(
            "".join(f"{n},{n[-5]}\n" for n in members)
        )
    splits = benchmarks.load_task("shenzhen", tmp_path)
    assert labels_of(splits) == {
        s: {n: (int(n[-5]),) for n in parts["valid" if s == "val" else s]}
        for s in ("train", "val", "test")
    }
    assert np.array_equal(
        read_film(splits.train[0].path), grays[0]
    )  # a palette image, by its grey values


def test_shenzhen_without_lists_is_drawn_in_the_same_proportions(tmp_path):
    names, _ = shenzhen_tree(tmp_path, 60)
    splits = benchmarks.load_task("shenzhen", tmp_path)
    found = labels_of(splits)
    assert sorted(n for part in found.values() for n in part) == names and all(
        t == (int(n[-5]),) for part in found.values() for n, t in part.items()
    )
    assert {s: len(p) for s, p in found.items()} == {
        "train": 42,
        "val": 6,
        "test": 12,
    }  # 60 × 463/65/134 of 662
    assert labels_of(
        benchmarks.load_task("shenzhen", tmp_path)
    ) == found and "no official lists" in " ".join(splits.notes)


# ---------------------------------------------------------------- ChestX-ray14

NIH_ROWS = [
    (f"{p:08d}_{k:03d}.png", p, f)
    for p, f in [
        (1, "Cardiomegaly|Emphysema"),
        (2, "No Finding"),
        (3, "Hernia"),
        (4, "Pleural_Thickening|Infiltration"),
        (5, "No Finding"),
        (6, "Mass"),
        (7, "Edema"),
        (8, "No Finding"),
        (9, "Nodule"),
        (10, "Atelectasis|Effusion|Mass"),
    ]
    for k in range(2)
]


def nih_tree(root, table="Data_Entry_2017.csv"):
    comma = (
        "," if table == "Data_Entry_2017.csv" else ""
    )  # the old table ends its lines with a comma
    lines = [
        "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
        + comma
    ]
    for k, (name, patient, findings) in enumerate(NIH_ROWS):
        picture(
            root / f"images_{k % 3 + 1:03d}" / "images" / name,
            "RGBA" if k % 4 == 0 else "L",
            seed=k,
        )
        lines.append(f"{name},{findings},0,{patient},058Y,M,PA,2682,2749,0.143,0.143{comma}")
    (root / table).write_text("\n".join(lines))
    (root / "train_val_list.txt").write_text(
        "\n".join(n for n, p, _ in NIH_ROWS if p <= 7)
    )  # no final newline
    (root / "test_list.txt").write_text("\n".join(n for n, p, _ in NIH_ROWS if p > 7))


@pytest.mark.parametrize("table", ["Data_Entry_2017.csv", "Data_Entry_2017_v2020.csv"])
def test_chestxray14_labels_patients_and_test_list(tmp_path, table):
    nih_tree(tmp_path, table)
    splits = benchmarks.load_task("chestxray14", tmp_path)
    truth = {
        n: tuple(int(label in f.split("|")) for label in benchmarks.NIH) for n, _, f in NIH_ROWS
    }
    found = labels_of(splits)
    assert {n: t for part in found.values() for n, t in part.items()} == truth
    assert set(found["test"]) == {n for n, p, _ in NIH_ROWS if p > 7}
    patients = [{c.patient for c in getattr(splits, s)} for s in ("train", "val", "test")]
    assert (
        patients[1]
        and not patients[0] & patients[1]
        and not (patients[0] | patients[1]) & patients[2]
    )
    assert read_film(splits.train[0].path).shape == (16, 16)  # RGBA


def test_chestxray14_official_lists_carry_labels(tmp_path):
    nih_tree(tmp_path)
    parts = {"train": [1, 2, 3, 4, 5], "val": [6, 7], "test": [8, 9, 10]}
    for split, members in parts.items():
        rows = [
            f"{n} " + " ".join(str(int(label in f.split("|"))) for label in benchmarks.NIH)
            for n, p, f in NIH_ROWS
            if p in members
        ]
        (tmp_path / f"Xray14_{split}_official.txt").write_text("\n".join(rows) + "\n")
    splits = benchmarks.load_task("chestxray14", tmp_path)
    assert {s: {int(c.patient) for c in getattr(splits, s)} for s in parts} == {
        s: set(m) for s, m in parts.items()
    }
    assert {c.path.name: c.target for c in splits.val}["00000006_000.png"] == tuple(
        int(label == "Mass") for label in benchmarks.NIH
    )


# ---------------------------------------------------------------- VinDr

VOTES = {  # image: three radiologists' sets
    "a" * 32: [{"Pleural effusion"}, set(), {"Pneumonia"}],
    "b" * 32: [{"No finding"}] * 3,
    "c" * 32: [{"COPD"}, set(), set()],
    "d" * 32: [{"Other diseases"}, {"No finding"}, set()],
    "e" * 32: [{"Tuberculosis"}] * 3,
}
COLUMNS = [
    "Aortic enlargement",
    "COPD",
    "Lung tumor",
    "Pneumonia",
    "Tuberculosis",
    "Other diseases",
    "Pleural effusion",
    "No finding",
]


def vindr_tree(root):
    base = root / "physionet.org" / "files" / "vindr-cxr" / "1.0.0"
    (base / "annotations").mkdir(parents=True)
    lines = ["image_id,rad_id," + ",".join(COLUMNS)]
    ramp = np.linspace(100, 4000, 16 * 16).reshape(16, 16).astype(int)
    for k, (name, votes) in enumerate(VOTES.items()):
        lines += [
            f"{name},R{r}," + ",".join(str(float(c in v)) if c in v else "" for c in COLUMNS)
            for r, v in enumerate(votes)
        ]
        dicom(
            base / "train" / f"{name}.dicom",
            4095 - ramp if k % 2 else ramp,
            12,
            "MONOCHROME1" if k % 2 else "MONOCHROME2",
            (2047, 4095),
        )
    (base / "annotations" / "image_labels_train.csv").write_text("\n".join(lines))
    columns = [c.replace("Other diseases", "Other disease") for c in COLUMNS]
    (base / "annotations" / "image_labels_test.csv").write_text(
        "\n".join(
            [
                "image_id," + ",".join(columns),
                "f" * 32 + ",0,0,1,0,0,1,0,0",
                "0" * 32 + ",0,0,0,0,0,0,0,1",
            ]
        )
    )
    for name in ("f" * 32, "0" * 32):
        dicom(base / "test" / f"{name}.dicom", ramp, 12)


def test_vindr_any_of_three_and_pleural_effusion_not_copd(tmp_path):
    vindr_tree(tmp_path)
    splits = benchmarks.load_task("vindr", tmp_path)
    found = {n.partition(".")[0]: t for part in labels_of(splits).values() for n, t in part.items()}
    assert all(
        found[n] == tuple(int(any(label in v for v in votes)) for label in benchmarks.VINDR)
        for n, votes in VOTES.items()
    )
    assert found["c" * 32] == (0,) * 6 and found["f" * 32] == (
        0,
        1,
        0,
        0,
        1,
        0,
    )  # COPD is no label; "Other disease" in the singular
    assert {c.path.stem for c in splits.test} == {"f" * 32, "0" * 32} and len(splits.val) == 1
    films = {c.path.stem: read_film(c.path).astype(int) for c in splits.train + splits.val}
    assert all(
        np.abs(film - films["a" * 32]).max() <= 1 and film[-1, -1] > film[0, 0]
        for film in films.values()
    )  # MONOCHROME1 turned over


def test_vindr_lists_with_crlf_and_folder_and_the_papers_validation_draw(tmp_path):
    names = [f"{k:032x}" for k in range(40)]
    for k, name in enumerate(names):
        dicom(tmp_path / ("train" if k < 30 else "test") / f"{name}.dicom", noise(k))
    for split, part in (("train", names[:30]), ("test", names[30:])):
        (tmp_path / f"VinDrCXR_{split}_pe_global_one.txt").write_bytes(
            "".join(f"{split}_jpeg/{n} 0 1 1 {k % 2} 0 0 \r\n" for k, n in enumerate(part)).encode()
        )
    splits = benchmarks.load_task("vindr", tmp_path)
    fit, val = train_test_split(names[:30], train_size=0.9, random_state=42)  # as the authors' code
    assert {c.path.stem for c in splits.train} == set(fit) and {
        c.path.stem for c in splits.val
    } == set(val)
    assert {c.path.stem: c.target for c in splits.test}[names[31]] == (0, 1, 1, 1, 0, 0)


# ---------------------------------------------------------------- CheXpert

CHEXPERT_HEADER = (
    "Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Enlarged Cardiomediastinum,Cardiomegaly,Lung Opacity,Lung Lesion,Edema,Consolidation,Pneumonia,"
    "Atelectasis,Pneumothorax,Pleural Effusion,Pleural Other,Fracture,Support Devices"
)


def chexpert_tree(root, prefix, folder, valid="valid"):
    """prefix: of the CSV; folder: where patient folders lie (None: the batches of the full release)."""
    rows = {"train": [], "valid": []}
    for p in range(1, 11):
        split, cells = (
            (
                "train",
                [",,,,,,,,,,,,,", ",,-1.0,,,-1.0,-1.0,,-1.0,,-1.0,,,", ",,1.0,,,0.0,,,,,1.0,,,"][
                    p % 3
                ],
            )
            if p <= 8
            else ("valid", ",,0.0,,,1.0,0.0,,1.0,,0.0,,,")
        )
        views = ["view1_frontal", "view2_lateral"]
        for view in views:
            tail = f"patient{p:05d}/study1/{view}.jpg"
            side = "Frontal,AP" if "frontal" in view else "Lateral,"
            rows[split].append(f"{prefix}{split}/{tail},Male,60,{side},{cells}")
            home = (
                {
                    "train": f"CheXpert-v1.0 batch {2 + p % 3} (train {1 + p % 3})",
                    "valid": "CheXpert-v1.0 batch 1 (validate & csv)/valid",
                }[split]
                if folder is None
                else folder + split
            )
            picture(root / home / tail, seed=p)
    home = root / ("CheXpert-v1.0 batch 1 (validate & csv)" if folder is None else folder)
    for name, lines in rows.items():
        (home / f"{name}.csv").write_text("\n".join([CHEXPERT_HEADER] + lines))


@pytest.mark.parametrize(
    "prefix, folder",
    [
        ("CheXpert-v1.0-small/", "CheXpert-v1.0-small/"),
        ("CheXpert-v1.0-small/", ""),
        ("CheXpert-v1.0/", None),
    ],
)
def test_chexpert_layouts_uncertain_labels_and_frontals(tmp_path, prefix, folder):
    chexpert_tree(tmp_path, prefix, folder)
    splits = benchmarks.load_task("chexpert", tmp_path)
    found = {c.patient: c.target for c in splits.train + splits.val + splits.test}
    # Atelectasis, Cardiomegaly, Consolidation, Edema, Pleural Effusion;  uncertain: 1 0 0 1 0
    truth = {
        p: [(0, 0, 0, 0, 0), (1, 0, 0, 1, 0), (0, 1, 0, 0, 1)][p % 3] if p <= 8 else (1, 0, 0, 1, 0)
        for p in range(1, 11)
    }
    assert found == {f"patient{p:05d}": t for p, t in truth.items()}
    assert {c.patient for c in splits.test} == {"patient00009", "patient00010"} and len(
        splits.val
    ) == 1
    assert all("frontal" in c.path.name for c in splits.train + splits.val + splits.test)


# ---------------------------------------------------------------- RSNA


def rsna_tree(root, side=64, folder="stage_2_train_images"):
    boxes = {
        k: [(3.0 * j + k, 2.0 * j, 5.0, 4.0 + j) for j in range(1 + k % 3)]
        if k % 3 == 0 or k % 5 == 0
        else []
        for k in range(30)
    }
    ids = [f"{k:08d}-0d0e-4c6f-9abc-{k:012d}" for k in range(30)]
    classes = [
        "Lung Opacity" if boxes[k] else ["Normal", "No Lung Opacity / Not Normal"][k % 2]
        for k in range(30)
    ]
    labels, info = ["patientId,x,y,width,height,Target"], ["patientId,class"]
    for k, name in enumerate(ids):
        dicom(root / folder / f"{name}.dcm", noise(k, side))
        labels += [f"{name},{x},{y},{w},{h},1" for x, y, w, h in boxes[k]] or [f"{name},,,,,0"]
        info += [f"{name},{classes[k]}"] * max(1, len(boxes[k]))
    dicom(root / "stage_2_test_images" / "ffffffff.dcm", noise(99, side))
    (root / "stage_2_train_labels.csv").write_text("\n".join(labels))
    (root / "stage_2_detailed_class_info.csv").write_text("\n".join(info))
    return ids, classes, boxes


@pytest.mark.parametrize("suffix", [".png", ""])
def test_rsna_duplicate_rows_and_lists_with_or_without_suffix(tmp_path, suffix):
    ids, classes, _ = rsna_tree(tmp_path)
    for split, part in (("train", ids[:20]), ("val", ids[20:24]), ("test", ids[24:])):
        (tmp_path / f"RSNAPneumonia_{split}.txt").write_text(
            "\n".join(f"{n}{suffix} 0" for n in part)
        )
    splits = benchmarks.load_task("rsna", tmp_path)
    assert [len(getattr(splits, s)) for s in ("train", "val", "test")] == [20, 4, 6]
    assert {
        c.path.stem: benchmarks.RSNA[int(np.argmax(c.target))]
        for c in splits.train + splits.val + splits.test
    } == dict(zip(ids, classes))


def test_rsna_boxes_are_filled_on_the_films_own_canvas(tmp_path):
    ids, _, boxes = rsna_tree(tmp_path)
    splits = benchmarks.load_task("rsna_seg", tmp_path)
    cases = {c.path.stem: c for c in splits.train + splits.val + splits.test}
    for k, name in enumerate(ids):
        truth = np.zeros((64, 64), bool)
        for y in range(64):
            for x in range(64):
                truth[y, x] = any(
                    bx <= x < bx + w and by <= y < by + h for bx, by, w, h in boxes[k]
                )
        assert np.array_equal(mask_of(cases[name]), truth)
    assert [len(getattr(splits, s)) for s in ("train", "val", "test")] == [24, 3, 3]


def test_rsna_boxes_of_shrunk_films_are_drawn_on_the_originals_canvas(tmp_path):
    rsna_tree(tmp_path, side=8)
    splits = benchmarks.load_task("rsna_seg", tmp_path)
    assert mask_of(splits.train[0]).shape == (1024, 1024) and "drawn on 1024 x 1024" in " ".join(
        splits.notes
    )


# ---------------------------------------------------------------- SIIM


def siim_tree(root, table="train-rle.csv"):
    rng, masks, lines = (
        np.random.default_rng(0),
        {},
        [
            " EncodedPixels".join(["ImageId,", ""])
            if table == "train-rle.csv"
            else "ImageId,EncodedPixels"
        ],
    )
    for k in range(20):
        name = f"1.2.276.0.7230010.3.1.4.8323329.{k}.1517875201.850819"
        folder = "dicom-images-test" if k >= 16 else "dicom-images-train"
        dicom(
            root
            / folder
            / f"1.2.276.0.7230010.3.1.2.{k}"
            / f"1.2.276.0.7230010.3.1.3.{k}"
            / f"{name}.dcm",
            noise(k, 32),
        )
        parts = [np.zeros((32, 32), bool) for _ in range(k % 4)]
        for part in parts:  # several rows of a film, overlapping
            y, x = rng.integers(4, 20, 2)
            part[y : y + 9, x : x + 7] = True
        masks[name] = np.any([np.zeros((32, 32), bool), *parts], axis=0)
        space = " " if table == "train-rle.csv" else ""
        lines += [f"{name},{space}{encode_rle(part)}" for part in parts] or [f"{name},{space}-1"]
    (root / table).write_text("\n".join(lines))
    return masks


@pytest.mark.parametrize("table", ["train-rle.csv", "stage_2_train.csv"])
def test_siim_unites_rows_and_tests_on_stage_one(tmp_path, table):
    masks = siim_tree(tmp_path, table)
    splits = benchmarks.load_task("siim", tmp_path)
    assert (
        len(splits.test) == 4
        and all("dicom-images-test" in str(c.path) for c in splits.test)
        and splits.kind == "mask"
    )
    cases = {c.path.name.removesuffix(".dcm"): c for c in splits.train + splits.val + splits.test}
    assert cases.keys() == masks.keys() and all(
        np.array_equal(mask_of(cases[n]), m) for n, m in masks.items()
    )
    assert "10 films have several rows" in " ".join(splits.notes)


def test_run_lengths_round_trip_and_follow_the_competitions_own_loop():
    rng = np.random.default_rng(1)
    for _ in range(20):
        mask = rng.random((7, 5)) < rng.choice([0.0, 0.3, 0.7, 1.0])
        text = encode_rle(mask)
        slow, at = np.zeros(35), 0  # mask_functions.py: rle2mask
        for gap, length in zip(*[map(int, text.split())] * 2) if text != "-1" else ():
            at += gap
            slow[at : at + length] = 1
            at += length
        assert np.array_equal(slow.reshape(5, 7).T.astype(bool), mask)
        assert text == "-1" or np.array_equal(decode_rle(text, 7, 5), mask)
    with pytest.raises(UserError, match="reach pixel 40"):
        decode_rle("30 10", 7, 5)


# ---------------------------------------------------------------- ChestDR


def chestdr_tree(root, count=40):
    rng = np.random.default_rng(0)
    names = [
        f"DX.1.2.392.200046.100.2.1.{k}.1.png" if k % 2 else f"5E2653D72460{k:03d}.png"
        for k in range(count)
    ]
    targets = {n: tuple(int(x) for x in rng.random(19) < 0.3) for n in names}
    for k, n in enumerate(names):
        picture(root / "MedFMC_train" / "chest" / "images" / n, seed=k)
    header = ",img_id," + ",".join(benchmarks.CHESTDR)
    (root / "MedFMC_train" / "chest" / "chest_train.csv").write_text(
        "\n".join(
            [header]
            + [f"{k},{n}," + ",".join(map(str, targets[n])) for k, n in enumerate(names)]
            + ["," * 20]
        )
    )
    return names, targets


def write_lists(folder, targets, **lists):
    folder.mkdir(exist_ok=True)
    for name, members in lists.items():
        (folder / f"{name.replace('__', '-')}.txt").write_text(
            "\n".join(f"{n} {','.join(map(str, targets[n]))}" for n in members) + "\n"
        )


def test_chestdr_few_shot_lists_overlap_and_are_disentangled(tmp_path):
    names, targets = chestdr_tree(tmp_path)
    write_lists(
        tmp_path / "anns",
        targets,
        chest_5__shot_train_exp1=names[:6] + names[:2],
        chest_5__shot_val_exp1=names[4:20],
        test_WithLabel=names[20:],
        chest_5__shot_train_exp2=names[10:12],
    )
    splits = benchmarks.load_task("chestdr", tmp_path, shots=5)
    assert splits.drawn and labels_of(splits) == {
        "train": {n: targets[n] for n in names[:6]},
        "val": {n: targets[n] for n in names[6:20]},
        "test": {n: targets[n] for n in names[20:]},
    }
    assert (
        "train: 2 repeated rows dropped" in splits.notes
        and "val: 2 films removed that are in train too" in splits.notes
    )


def test_chestdr_whole_lists_and_table(tmp_path):
    names, targets = chestdr_tree(tmp_path)
    splits = benchmarks.load_task("chestdr", tmp_path)  # the table alone; its last row is blank
    assert {
        n: t for part in labels_of(splits).values() for n, t in part.items()
    } == targets and not splits.drawn
    write_lists(
        tmp_path / "anns",
        targets,
        train_20=names[:16],
        val_20=names[16:20],
        test_WithLabel=names[20:],
    )
    splits = benchmarks.load_task("chestdr", tmp_path, shots=1)
    assert [len(getattr(splits, s)) for s in ("train", "val", "test")] == [
        16,
        4,
        20,
    ] and not splits.drawn


# ---------------------------------------------------------------- csv


def csv_tree(root, header, rows):
    for k in range(12):
        picture(root / "films" / f"{k}.png", seed=k)
        mask = np.zeros((16, 16), np.uint8)
        mask[k:] = 255
        (root / "masks").mkdir(exist_ok=True)
        Image.fromarray(mask).save(root / "masks" / f"{k}.png")
    table = root / "table.csv"
    table.write_text("\n".join([header] + rows))
    return table


def test_csv_names_several_labels_and_keeps_patients_together(tmp_path):
    labels = ["normal", "effusion", "effusion|mass", "No Finding"] * 3
    table = csv_tree(
        tmp_path, "filename,label,patient_id", [f"{k}.png,{labels[k]},p{k // 2}" for k in range(12)]
    )
    splits = benchmarks.load_task("csv", tmp_path, table)
    assert splits.labels == ("effusion", "mass") and splits.kind == "labels"
    assert {int(c.path.stem): c.target for c in splits.train + splits.val + splits.test} == {
        k: [(0, 0), (1, 0), (1, 1), (0, 0)][k % 4] for k in range(12)
    }
    homes = {c.patient: s for s in ("train", "val", "test") for c in getattr(splits, s)}
    assert all(
        homes[c.patient] == s for s in ("train", "val", "test") for c in getattr(splits, s)
    ) and set(homes.values()) == {"train", "val", "test"}


def test_csv_two_exclusive_names_zero_one_columns_and_split(tmp_path):
    split = ["train"] * 8 + ["val"] * 2 + ["test"] * 2
    table = csv_tree(
        tmp_path,
        "filename,label,split",
        [f"films/{k}.png,{['benign', 'malignant'][k % 2]},{split[k]}" for k in range(12)],
    )
    splits = benchmarks.load_task("csv", tmp_path, table)
    assert (
        splits.labels == ("malignant",)
        and [c.target for c in splits.train] == [(k % 2,) for k in range(8)]
        and len(splits.val) == len(splits.test) == 2
    )
    table = csv_tree(
        tmp_path,
        "filename,a,age,b,split",
        [f"{k}.png,{k % 2},{k},{int(k > 5)},{split[k]}" for k in range(12)],
    )
    splits = benchmarks.load_task("csv", tmp_path, table)
    assert splits.labels == ("a", "b") and splits.test[1].target == (1, 1)


def test_csv_mask_column_is_segmentation_unless_another_is_asked_for(tmp_path):
    table = csv_tree(
        tmp_path,
        "filename,label,mask",
        [
            f"{k}.png,{'mass' if k % 2 else 'normal'},{f'masks/{k}.png' if k else ''}"
            for k in range(12)
        ],
    )
    splits = benchmarks.load_task("csv", tmp_path, table)
    assert splits.kind == "mask" and all(
        mask_of(c).sum() == (16 * (16 - int(c.path.stem)) if c.path.stem != "0" else 0)
        for c in splits.train + splits.val + splits.test
    )
    assert benchmarks.load_task("csv", tmp_path, table, column="label").kind == "labels"


@pytest.mark.parametrize(
    "header, rows, message",
    [
        (
            "filename,label,split",
            ["0.png,a,train", "77.png,b,test", "1.png,b,test"],
            "1 of the 2 films named by the test list are not there, the first: 77.png",
        ),
        ("filename,label,split", ["0.png,a,train", "1.png,b,tset"], "column split must name"),
        (
            "filename,label,patient_id,split",
            ["0.png,a,7,train", "1.png,b,7,test", "2.png,b,8,val"],
            "patient 7 has films in test and in train",
        ),
        (
            "filename,label,split",
            ["0.png,a,train", "0.png,b,train", "1.png,b,test", "2.png,b,val"],
            "stands twice in train, with different labels",
        ),
        (
            "filename,mask",
            ["0.png,masks/99.png", "1.png,masks/1.png"],
            "1 of the 2 masks are not there",
        ),
        ("name,label", ["0.png,a"], "no column filename; its columns are name, label"),
        ("filename,age", ["0.png,51"], "no column label"),
        ("filename,label", ["0.png,normal", "1.png,normal"], "names no class beside"),
        ("filename,label", [], "no column filename"),
    ],
)
def test_csv_errors_are_one_clear_line(tmp_path, header, rows, message):
    with pytest.raises(UserError, match=message) as stop:
        benchmarks.load_task("csv", tmp_path, csv_tree(tmp_path, header, rows))
    assert "\n" not in str(stop.value)


# ---------------------------------------------------------------- common rules


def test_absent_files_show_the_tree_and_absent_films_their_count(tmp_path):
    for name in benchmarks.TASKS:
        with pytest.raises(
            UserError, match="--labels" if name == "csv" else "Expected for task"
        ) as stop:
            benchmarks.load_task(name, tmp_path)
        assert name == "csv" or benchmarks.TASKS[name].tree in str(stop.value)
    nih_tree(tmp_path)
    for name in ("00000001_000.png", "00000001_001.png"):
        next(tmp_path.rglob(name)).unlink()
    with pytest.raises(
        UserError,
        match="2 of the 14 films named by the train list are not there, the first: 00000001_000.png, 00000001_001.png",
    ):
        benchmarks.load_task("chestxray14", tmp_path)
    with pytest.raises(UserError, match="no folder .*nowhere.* for task siim: give --data"):
        benchmarks.find_root("siim", tmp_path / "nowhere")


def test_tables_that_are_none_are_named(tmp_path):
    table = csv_tree(tmp_path, "filename,label", ["0.png,a"])
    table.write_bytes("filename,label\n0.png,Erguß".encode("cp1252"))
    with pytest.raises(UserError, match="table.csv: cannot be read as a table"):
        benchmarks.load_task("csv", tmp_path, table)
    (tmp_path / "l.txt").write_text("a.png zero one")
    with pytest.raises(UserError, match="l.txt: not a split list"):
        read_list(tmp_path / "l.txt")


def test_find_root_looks_in_cxr_and_rsna_tasks_share_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("CXR", str(tmp_path))
    (tmp_path / "rsna").mkdir()
    assert benchmarks.find_root("rsna") == benchmarks.find_root("rsna_seg") == tmp_path / "rsna"


def test_cached_index_is_used_and_renewed_when_films_arrive(tmp_path):
    root, cache = tmp_path / "data", tmp_path / "index.txt"
    picture(root / "a.png")
    Index(root, cache)
    before = cache.read_text()
    picture(root / "sub" / "b.png")
    index = Index(root, cache)
    assert (
        index.names == ["a.png"]
        and index.find(["a.png"]) == [root / "a.png"]
        and cache.read_text() == before
    )
    assert index.find(["b"]) == [root / "sub" / "b.png"] and cache.read_text() != before
    picture(root / "other" / "b.png")
    with pytest.raises(UserError, match="one film name, several files"):
        Index(root).find(["b.png"])
    assert Index(root).find(["other/b.png"], depth=0) == [root / "other" / "b.png"]


def test_names_keep_their_dots_and_lists_their_numbers(tmp_path):
    assert (
        without_suffix("DX.1.2.392.png") == "DX.1.2.392"
        and without_suffix("CR.1.3.12") == "CR.1.3.12"
        and without_suffix("a/b.dicom") == "a/b"
    )
    (tmp_path / "l.txt").write_bytes(b"a.png 0,1,0\r\nb,1\r\n\r\nc\r\n")
    assert read_list(tmp_path / "l.txt") == [("a.png", (0, 1, 0)), ("b", (1,)), ("c", ())]


def test_draws_are_keyed_by_seed_and_classes_without_positives_are_named():
    cases = [
        Example(Path(f"{k}.png"), (int(k % 10 == 0), int(k % 3 == 0)), str(k)) for k in range(100)
    ]
    for kind in (dict(fraction=0.1), dict(shots=4)):
        assert (
            draw_few(cases, seed=1, **kind)
            == draw_few(cases, seed=1, **kind)
            != draw_few(cases, seed=2, **kind)
        )
    assert (
        len(draw_few(cases, 0.1)) == 10
        and draw_few(cases) == cases
        and len(draw_few(cases, 1e-9)) == 1
    )
    shot = draw_few(cases, shots=4)
    assert (
        all(sum(c.target[k] for c in shot) >= 4 for k in (0, 1))
        and sum(not any(c.target) for c in shot) == 4
        and len(shot) <= 12
    )
    splits = Splits("csv", "labels", ("rare", "third"), cases[1:10], cases, cases[:1], [])
    assert class_warnings(splits) == [
        "warning: train has no positive film of rare: it cannot be learnt",
        "warning: test has no negative film of rare: it has no AUROC",
        "warning: test has no negative film of third: it has no AUROC",
    ]


@pytest.mark.skipif(not REAL.is_dir(), reason="no real films beside the repository")
def test_real_tables_are_read(tmp_path):
    splits = benchmarks.load_task(
        "csv", REAL / "films", REAL / "tasks" / "nih_pneumonia.csv", cache=tmp_path / "index.txt"
    )
    counts = splits.counts()
    assert splits.labels == ("pneumonia",) and [
        counts[s]["positive"]["pneumonia"] for s in ("train", "val", "test")
    ] == [162, 26, 61]
