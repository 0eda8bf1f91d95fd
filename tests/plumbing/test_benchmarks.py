"""Every downstream set as a miniature tree, laid out as it is distributed.

The labels that the readers find are compared with what was drawn.
"""

import re
from dataclasses import replace

import numpy as np
import pytest
from conftest import REAL
from films_for_tests import write_dicom
from PIL import Image
from sklearn.model_selection import train_test_split

import finetune
from data import TaskFilms
from plumbing import benchmarks
from plumbing.film import decode_rle, read_film, read_mask
from plumbing.launch import UserError
from plumbing.words import SPLITS


def picture(path, mode="L", side=16, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    grey = noise(seed, side).astype(np.uint8)
    if mode == "P":  # reversed palette: the indices are not the grey values
        image = Image.fromarray(255 - grey).convert("P")
        image.putpalette(np.repeat(np.arange(255, -1, -1, dtype=np.uint8), 3).tobytes())
    else:
        image = Image.fromarray(grey).convert(mode)
    image.save(path)
    return grey


def dicom(path, pixels, **tags):
    """A DICOM film of 8 bits, or, with BitsStored=12, of 12."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if "BitsStored" not in tags:
        tags |= dict(BitsAllocated=8, BitsStored=8, HighBit=7)
        tags |= dict(PixelData=pixels.astype(np.uint8).tobytes())
    write_dicom(path, pixels, **tags)


def noise(seed=0, side=16):
    return np.random.default_rng(seed).integers(0, 256, (side, side))


def write_lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines))


def targets_by_split(splits):
    """{split: {file name: target}}"""
    return {
        split: {example.path.name: example.truth for example in getattr(splits, split)}
        for split in SPLITS
    }


def everything(splits):
    return splits.train + splits.val + splits.test


def sizes(splits):
    return [len(getattr(splits, split)) for split in SPLITS]


def mask_of(example):
    return read_mask(example.mask)


# ---------------------------------------------------------------- Shenzhen
def shenzhen_tree(root, count=20):
    names = [f"CHNCXR_{k:04d}_{int(k > count // 2)}.png" for k in range(1, count + 1)]
    films = root / "ChinaSet_AllFiles" / "CXR_png"
    greys = [picture(films / name, ["P", "RGB"][k % 2], seed=k) for k, name in enumerate(names)]
    # The lung masks' zip, unpacked beside it.
    picture(root / "mask" / "mask" / "CHNCXR_0001_0_mask.png")
    return names, greys


def test_shenzhen_lists_with_their_misspelt_names(tmp_path):
    names, greys = shenzhen_tree(tmp_path)
    parts = {
        "train": names[:8] + names[10:18],
        "valid": [names[8], names[18]],
        "test": [names[9], names[19]],
    }
    for split, members in parts.items():
        lines = [f"{name},{name[-5]}" for name in members]
        write_lines(tmp_path / f"ShenzenCXR_{split}_data.txt", lines)
    splits = benchmarks.load_task("shenzhen", tmp_path)
    parts["val"] = parts.pop("valid")
    truth = {split: {name: (int(name[-5]),) for name in parts[split]} for split in SPLITS}
    assert targets_by_split(splits) == truth
    # A palette image is read by its grey values.
    assert np.array_equal(read_film(splits.train[0].path), greys[0])


def test_shenzhen_without_lists_is_drawn_in_the_same_proportions(tmp_path):
    names, _ = shenzhen_tree(tmp_path, 60)
    splits = benchmarks.load_task("shenzhen", tmp_path)
    found = {example.path.name: example.truth for example in everything(splits)}
    assert sorted(example.path.name for example in everything(splits)) == names
    assert found == {name: (int(name[-5]),) for name in names}
    assert sizes(splits) == [42, 6, 12]  # 60 × 463/65/134 of 662
    again = benchmarks.load_task("shenzhen", tmp_path)
    assert targets_by_split(again) == targets_by_split(splits)
    assert "the data name no test films" in " ".join(splits.notes)


# ---------------------------------------------------------------- ChestX-ray14
NIH_FINDINGS = [
    "Cardiomegaly|Emphysema",
    "No Finding",
    "Hernia",
    "Pleural_Thickening|Infiltration",
    "No Finding",
    "Mass",
    "Edema",
    "No Finding",
    "Nodule",
    "Atelectasis|Effusion|Mass",
]
NIH_ROWS = [
    (f"{patient:08d}_{k:03d}.png", patient, findings)
    for patient, findings in enumerate(NIH_FINDINGS, start=1)
    for k in range(2)
]
NIH_HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)


def nih_tree(root, table="Data_Entry_2017.csv"):
    # The old table ends its lines with a comma.
    comma = "," if table == "Data_Entry_2017.csv" else ""
    lines = [NIH_HEADER + comma]
    for k, (name, patient, findings) in enumerate(NIH_ROWS):
        mode = "RGBA" if k % 4 == 0 else "L"
        picture(root / f"images_{k % 3 + 1:03d}" / "images" / name, mode, seed=k)
        lines.append(f"{name},{findings},0,{patient},058Y,M,PA,2682,2749,0.143,0.143{comma}")
    write_lines(root / table, lines)
    # The lists end without a line end.
    write_lines(root / "train_val_list.txt", [name for name, p, _ in NIH_ROWS if p <= 7])
    write_lines(root / "test_list.txt", [name for name, p, _ in NIH_ROWS if p > 7])


def nih_target(findings):
    return tuple(int(label in findings.split("|")) for label in benchmarks.NIH)


@pytest.mark.parametrize("table", ["Data_Entry_2017.csv", "Data_Entry_2017_v2020.csv"])
def test_chestxray14_labels_patients_and_test_list(tmp_path, table):
    nih_tree(tmp_path, table)
    splits = benchmarks.load_task("chestxray14", tmp_path)
    found = {example.path.name: example.truth for example in everything(splits)}
    assert found == {name: nih_target(findings) for name, _, findings in NIH_ROWS}
    test = {example.path.name for example in splits.test}
    assert test == {name for name, patient, _ in NIH_ROWS if patient > 7}
    train, val, test = ({example.patient for example in getattr(splits, s)} for s in SPLITS)
    assert val and not train & val and not (train | val) & test
    assert read_film(splits.train[0].path).shape == (16, 16)  # RGBA


def test_chestxray14_official_lists_carry_labels(tmp_path):
    nih_tree(tmp_path)
    parts = {"train": [1, 2, 3, 4, 5], "val": [6, 7], "test": [8, 9, 10]}
    for split, members in parts.items():
        lines = [
            f"{name} {' '.join(map(str, nih_target(findings)))}"
            for name, patient, findings in NIH_ROWS
            if patient in members
        ]
        write_lines(tmp_path / f"Xray14_{split}_official.txt", [*lines, ""])
    splits = benchmarks.load_task("chestxray14", tmp_path)
    for split, members in parts.items():
        assert {int(example.patient) for example in getattr(splits, split)} == set(members)
    found = {example.path.name: example.truth for example in splits.val}
    assert found["00000006_000.png"] == nih_target("Mass")


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
    lines = ["image_id,rad_id," + ",".join(COLUMNS)]
    ramp = np.linspace(100, 4000, 16 * 16).reshape(16, 16).astype(int)
    for k, (name, votes) in enumerate(VOTES.items()):
        for reader, seen in enumerate(votes):
            cells = ["1.0" if column in seen else "" for column in COLUMNS]
            lines.append(f"{name},R{reader}," + ",".join(cells))
        pixels = 4095 - ramp if k % 2 else ramp
        tags = dict(PhotometricInterpretation="MONOCHROME1" if k % 2 else "MONOCHROME2")
        tags |= dict(BitsStored=12, WindowCenter=2047, WindowWidth=4095)
        dicom(base / "train" / f"{name}.dicom", pixels, **tags)
    write_lines(base / "annotations" / "image_labels_train.csv", lines)
    header = ",".join(["image_id", *COLUMNS]).replace("Other diseases", "Other disease")
    lines = [header, "f" * 32 + ",0,0,1,0,0,1,0,0", "0" * 32 + ",0,0,0,0,0,0,0,1"]
    write_lines(base / "annotations" / "image_labels_test.csv", lines)
    for name in ("f" * 32, "0" * 32):
        dicom(base / "test" / f"{name}.dicom", ramp, BitsStored=12)


def test_vindr_any_of_three_and_pleural_effusion_not_copd(tmp_path):
    vindr_tree(tmp_path)
    splits = benchmarks.load_task("vindr", tmp_path)
    found = {example.path.stem: example.truth for example in everything(splits)}
    for name, votes in VOTES.items():
        seen = set().union(*votes)
        assert found[name] == tuple(int(label in seen) for label in benchmarks.VINDR)
    assert found["c" * 32] == (0,) * 6  # COPD is no label
    assert found["f" * 32] == (0, 1, 0, 0, 1, 0)  # "Other disease" in the singular
    assert {example.path.stem for example in splits.test} == {"f" * 32, "0" * 32}
    assert len(splits.val) == 1
    films = [read_film(example.path).astype(int) for example in splits.train + splits.val]
    for film in films:  # MONOCHROME1 is turned over
        assert np.abs(film - films[0]).max() <= 1
        assert film[-1, -1] > film[0, 0]


def test_vindr_table_without_a_label_names_its_columns(tmp_path):
    table = tmp_path / "image_labels_train.csv"
    write_lines(table, ["image_id," + ",".join(COLUMNS[:5]), "a,0,0,0,0,0"])
    with pytest.raises(UserError, match="no column Pleural effusion, Other disease, No finding; "):
        benchmarks.load_task("vindr", tmp_path)


def test_blanks_are_the_number_0_and_words_are_none():
    cells = ["1.0", "-1", "1,0", "", "nan"]
    assert [benchmarks.read_number("t.csv", {}, cell) for cell in cells] == [1, -1, 1, 0, 0]
    with pytest.raises(UserError, match="t.csv: a.png: 'yes' is no number"):
        benchmarks.read_number("t.csv", {"film": "a.png"}, "yes")


def test_vindr_lists_with_crlf_and_folder_and_the_papers_validation_draw(tmp_path):
    names = [f"{k:032x}" for k in range(40)]
    for k, name in enumerate(names):
        dicom(tmp_path / ("train" if k < 30 else "test") / f"{name}.dicom", noise(k))
    for split, part in (("train", names[:30]), ("test", names[30:])):
        lines = [f"{split}_jpeg/{name} 0 1 1 {k % 2} 0 0 \r\n" for k, name in enumerate(part)]
        (tmp_path / f"VinDrCXR_{split}_pe_global_one.txt").write_bytes("".join(lines).encode())
    splits = benchmarks.load_task("vindr", tmp_path)
    fit, val = train_test_split(names[:30], train_size=0.9, random_state=42)  # as the authors' code
    assert {example.path.stem for example in splits.train} == set(fit)
    assert {example.path.stem for example in splits.val} == set(val)
    found = {example.path.stem: example.truth for example in splits.test}
    assert found[names[31]] == (0, 1, 1, 1, 0, 0)


# ---------------------------------------------------------------- CheXpert
CHEXPERT_HEADER = (
    "Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Enlarged Cardiomediastinum,Cardiomegaly,"
    "Lung Opacity,Lung Lesion,Edema,Consolidation,Pneumonia,Atelectasis,Pneumothorax,"
    "Pleural Effusion,Pleural Other,Fracture,Support Devices"
)
CHEXPERT_CELLS = [",,,,,,,,,,,,,", ",,-1.0,,,-1.0,-1.0,,-1.0,,-1.0,,,", ",,1.0,,,0.0,,,,,1.0,,,"]
# Atelectasis, Cardiomegaly, Consolidation, Edema, Pleural Effusion; uncertain: 1 0 0 1 0
CHEXPERT_TARGETS = [(0, 0, 0, 0, 0), (1, 0, 0, 1, 0), (0, 1, 0, 0, 1)]


def chexpert_tree(root, prefix, folder):
    """prefix: of the CSV; folder: where patient folders lie (None: the batches of the release)."""
    rows = {"train": [], "valid": []}
    first_batch = "CheXpert-v1.0 batch 1 (validate & csv)"
    for p in range(1, 11):
        split = "train" if p <= 8 else "valid"
        cells = CHEXPERT_CELLS[p % 3] if p <= 8 else ",,0.0,,,1.0,0.0,,1.0,,0.0,,,"
        batches = {
            "train": f"CheXpert-v1.0 batch {2 + p % 3} (train {1 + p % 3})",
            "valid": f"{first_batch}/valid",
        }
        home = batches[split] if folder is None else folder + split
        for view, side in (("view1_frontal", "Frontal,AP"), ("view2_lateral", "Lateral,")):
            tail = f"patient{p:05d}/study1/{view}.jpg"
            rows[split].append(f"{prefix}{split}/{tail},Male,60,{side},{cells}")
            picture(root / home / tail, seed=p)
    home = root / (first_batch if folder is None else folder)
    for name, lines in rows.items():
        write_lines(home / f"{name}.csv", [CHEXPERT_HEADER, *lines])


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
    truth = {f"patient{p:05d}": CHEXPERT_TARGETS[p % 3] for p in range(1, 9)}
    truth |= {"patient00009": (1, 0, 0, 1, 0), "patient00010": (1, 0, 0, 1, 0)}
    assert {example.patient: example.truth for example in everything(splits)} == truth
    assert {example.patient for example in splits.test} == {"patient00009", "patient00010"}
    assert len(splits.val) == 1
    assert all("frontal" in example.path.name for example in everything(splits))


# ---------------------------------------------------------------- RSNA
def rsna_boxes(k):
    """Film k has one to three boxes (x, y, width, height), or none, in 64ths of the canvas."""
    if k % 3 and k % 5:
        return []
    return [(3.0 * j + k, 2.0 * j, 5.0, 4.0 + j) for j in range(1 + k % 3)]


def rsna_tree(root, side=64, folder="stage_2_train_images"):
    boxes = [rsna_boxes(k) for k in range(30)]
    ids = [f"{k:08d}-0d0e-4c6f-9abc-{k:012d}" for k in range(30)]
    without = ["Normal", "No Lung Opacity / Not Normal"]
    classes = ["Lung Opacity" if boxes[k] else without[k % 2] for k in range(30)]
    labels = ["patientId,x,y,width,height,Target"]
    info = ["patientId,class"]
    for k, name in enumerate(ids):
        dicom(root / folder / f"{name}.dcm", noise(k, side))
        pixels = [",".join(str(16 * number) for number in box) for box in boxes[k]]
        labels += [f"{name},{box},1" for box in pixels] or [f"{name},,,,,0"]
        info += [f"{name},{classes[k]}"] * max(1, len(boxes[k]))
    dicom(root / "stage_2_test_images" / "ffffffff.dcm", noise(99, side))
    write_lines(root / "stage_2_train_labels.csv", labels)
    write_lines(root / "stage_2_detailed_class_info.csv", info)
    return ids, classes, boxes


@pytest.mark.parametrize("suffix", [".png", ""])
def test_rsna_duplicate_rows_and_lists_with_or_without_suffix(tmp_path, suffix):
    ids, classes, _ = rsna_tree(tmp_path)
    for split, part in (("train", ids[:20]), ("val", ids[20:24]), ("test", ids[24:])):
        lines = [f"{name}{suffix} 0" for name in part]
        write_lines(tmp_path / f"RSNAPneumonia_{split}.txt", lines)
    splits = benchmarks.load_task("rsna", tmp_path)
    assert sizes(splits) == [20, 4, 6]
    found = {
        example.path.stem: benchmarks.RSNA[int(np.argmax(example.truth))]
        for example in everything(splits)
    }
    assert found == dict(zip(ids, classes, strict=True))


def test_rsna_boxes_are_filled_and_squeezed_as_their_films_are(tmp_path):
    ids, _, boxes = rsna_tree(tmp_path)
    splits = benchmarks.load_task("rsna_seg", tmp_path)
    examples = {example.path.stem: example for example in everything(splits)}
    y, x = np.mgrid[:64, :64]
    for name, of_film in zip(ids, boxes, strict=True):
        truth = np.zeros((64, 64), bool)
        for left, top, width, height in of_film:
            truth |= (left <= x) & (x < left + width) & (top <= y) & (y < top + height)
        assert np.array_equal(mask_of(examples[name]), np.kron(truth, np.ones((16, 16))))
        (film, mask), *_ = TaskFilms([examples[name]], 64)
        assert film.shape == (64, 64) and np.array_equal(mask, truth)
    assert sizes(splits) == [24, 3, 3]
    assert "drawn on 1024 x 1024" in " ".join(splits.notes)


def test_the_sets_lists_saved_anew_say_the_same_or_are_refused(tmp_path):
    rsna_tree(tmp_path / "rsna")
    siim_tree(tmp_path / "siim")
    tables = (tmp_path / "rsna/stage_2_train_labels.csv", tmp_path / "siim/train-rle.csv")
    for task, table, end, spellings, odd in (
        ("rsna_seg", tables[0], ",1", (",1.0", ",TRUE"), ",x"),
        ("siim", tables[1], ", -1", (", -1.0", ", nan", ", "), ", 5 6 7"),
    ):
        text = table.read_text()
        masks = [example.mask for example in everything(benchmarks.load_task(task, table.parent))]
        for other in spellings:
            table.write_text(re.sub(f"{end}$", other, text, flags=re.MULTILINE))
            again = everything(benchmarks.load_task(task, table.parent))
            assert [example.mask for example in again] == masks
        table.write_text(re.sub(f"{end}$", odd, text, flags=re.MULTILINE))
        with pytest.raises(UserError, match=f"{table.name}: .*(neither 1 nor 0|no pairs of run)"):
            benchmarks.load_task(task, table.parent)


@pytest.mark.parametrize(
    "task, line",
    [
        ("rsna_seg", "x,1000,0,25,9,1"),
        ("rsna_seg", "x,-1,0,25,9,1"),
        ("siim", "x, 1048570 7"),
    ],
)
def test_annotations_outside_of_their_canvas_are_refused(tmp_path, task, line):
    rsna_tree(tmp_path)
    siim_tree(tmp_path)
    table = tmp_path / {"rsna_seg": "stage_2_train_labels.csv", "siim": "train-rle.csv"}[task]
    table.write_text(table.read_text() + "\n" + line)
    with pytest.raises(UserError, match=f"{table.name}: x: .* outside 1024 x 1024"):
        benchmarks.load_task(task, tmp_path)


# ---------------------------------------------------------------- SIIM
def encode_rle(mask):
    """bool (H, W) → run lengths as SIIM writes them, '-1' when empty; the inverse of decode_rle."""
    column_after_column = np.asarray(mask, np.int8).T.ravel()
    edges = np.flatnonzero(np.diff(np.r_[0, column_after_column, 0]))
    starts, ends = edges[::2], edges[1::2]
    gaps = starts - np.r_[0, ends[:-1]]
    pairs = zip(gaps, ends - starts, strict=True)
    return " ".join(f"{gap} {length}" for gap, length in pairs) or "-1"


def siim_tree(root, table="train-rle.csv"):
    rng = np.random.default_rng(0)
    space = " " if table == "train-rle.csv" else ""  # stage 1 wrote one before name and value
    lines = [f"ImageId,{space}EncodedPixels"]
    masks = {}
    for k in range(20):
        name = f"1.2.276.0.7230010.3.1.4.8323329.{k}.1517875201.850819"
        folder = root / ("dicom-images-test" if k >= 16 else "dicom-images-train")
        study = folder / f"1.2.276.0.7230010.3.1.2.{k}" / f"1.2.276.0.7230010.3.1.3.{k}"
        dicom(study / f"{name}.dcm", noise(k, 32))
        masks[name] = np.zeros((1024, 1024), bool)
        for _ in range(k % 4):  # several rows of a film, overlapping
            part = np.zeros((1024, 1024), bool)
            y, x = rng.integers(128, 640, 2)
            part[y : y + 300, x : x + 222] = True
            masks[name] |= part
            lines.append(f"{name},{space}{encode_rle(part)}")
        if k % 4 == 0:
            lines.append(f"{name},{space}-1")
    write_lines(root / table, lines)
    return masks


@pytest.mark.parametrize("table", ["train-rle.csv", "stage_2_train.csv"])
def test_siim_unites_rows_and_tests_on_stage_one(tmp_path, table):
    masks = siim_tree(tmp_path, table)
    splits = benchmarks.load_task("siim", tmp_path)
    assert splits.kind == "mask" and len(splits.test) == 4
    assert all("dicom-images-test" in str(example.path) for example in splits.test)
    examples = {example.path.name.removesuffix(".dcm"): example for example in everything(splits)}
    assert examples.keys() == masks.keys()
    for name, mask in masks.items():
        assert np.array_equal(mask_of(examples[name]), mask)
    assert "10 films have several rows" in " ".join(splits.notes)


# ---------------------------------------------------------------- ChestDR
def chestdr_tree(root, count=40):
    rng = np.random.default_rng(0)
    names = [
        f"DX.1.2.392.200046.100.2.1.{k}.1.png" if k % 2 else f"5E2653D72460{k:03d}.png"
        for k in range(count)
    ]
    targets = {name: tuple((rng.random(19) < 0.3).astype(int).tolist()) for name in names}
    home = root / "MedFMC_train" / "chest"
    lines = [",img_id," + ",".join(benchmarks.CHESTDR)]
    for k, name in enumerate(names):
        picture(home / "images" / name, seed=k)
        lines.append(f"{k},{name}," + ",".join(map(str, targets[name])))
    write_lines(home / "chest_train.csv", [*lines, "," * 20])  # the last row is blank
    return names, targets


def write_lists(folder, targets, **lists):
    """Write lists of films with their labels; two underscores in a name stand for a hyphen."""
    for name, members in lists.items():
        lines = [f"{film} {','.join(map(str, targets[film]))}" for film in members]
        write_lines(folder / f"{name.replace('__', '-')}.txt", [*lines, ""])


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
    assert splits.drawn
    assert targets_by_split(splits) == {
        "train": {name: targets[name] for name in names[:6]},
        "val": {name: targets[name] for name in names[6:20]},
        "test": {name: targets[name] for name in names[20:]},
    }
    assert "train: 2 repeated rows dropped" in splits.notes
    assert "val: 2 films removed that are in train too" in splits.notes
    args = finetune.Config(task="chestdr", shots=5, draw=1)
    with pytest.raises(
        UserError, match="--draw does nothing with the set's own lists of --shots 5"
    ):
        finetune.find_examples(args, tmp_path)
    assert len(finetune.find_examples(replace(args, draw=0), tmp_path).train) == 6


def test_chestdr_whole_lists_and_table(tmp_path):
    names, targets = chestdr_tree(tmp_path)
    splits = benchmarks.load_task("chestdr", tmp_path)  # the table alone
    assert {example.path.name: example.truth for example in everything(splits)} == targets
    assert not splits.drawn
    write_lists(
        tmp_path / "anns",
        targets,
        train_20=names[:16],
        val_20=names[16:20],
        test_WithLabel=names[20:],
    )
    splits = benchmarks.load_task("chestdr", tmp_path, shots=1)
    assert sizes(splits) == [16, 4, 20] and not splits.drawn


# ---------------------------------------------------------------- a CSV of one's own
def csv_tree(root, header, rows):
    for k in range(12):
        picture(root / "films" / f"{k}.png", seed=k)
        mask = np.zeros((16, 16), np.uint8)
        mask[k:] = 255
        (root / "masks").mkdir(exist_ok=True)
        Image.fromarray(mask).save(root / "masks" / f"{k}.png")
    table = root / "table.csv"
    write_lines(table, [header, *rows])
    return table


def test_csv_draws_the_same_splits_whatever_the_order_of_its_rows(tmp_path):
    rows = [f"{k}.png,{k % 2},p{k}" for k in range(12)]
    drawn = []
    for order in (rows, rows[::-1], rows[::2] + rows[1::2]):
        table = csv_tree(tmp_path, "filename,label,patient_id", order)
        splits = benchmarks.load_task("csv", tmp_path, table)
        drawn.append({split: {e.path.name for e in getattr(splits, split)} for split in SPLITS})
    assert drawn[0] == drawn[1] == drawn[2]


def test_masks_that_cannot_be_used_are_refused_before_training_with_their_row(tmp_path):
    rows = ["0.png,"] + [f"{k}.png,masks/{k}.png" for k in range(1, 6)]
    table = csv_tree(tmp_path, "filename,mask", rows)
    assert len(everything(benchmarks.load_task("csv", tmp_path, table))) == 6
    (tmp_path / "masks" / "3.png").write_bytes(b"half a PNG")
    picture(tmp_path / "masks" / "4.png")  # a film
    Image.fromarray(np.zeros((16, 40), np.uint8)).save(tmp_path / "masks" / "5.png")
    for bad in (3, 4, 5):
        with pytest.raises(UserError, match=rf"1 of 3 masks cannot .*line {bad + 2}, {bad}.png: "):
            kept = [row for k, row in enumerate(rows) if k not in {3, 4, 5} - {bad}]
            lines = ["filename,mask", *kept]
            lines[4:4] = [""] * (bad - 3)  # the row keeps its place in the file
            write_lines(table, lines)
            benchmarks.load_task("csv", tmp_path, table)


def test_csv_mask_column_is_segmentation_unless_another_is_asked_for(tmp_path):
    rows = []
    for k in range(12):
        label = "mass" if k % 2 else "normal"
        mask = f"masks/{k}.png" if k else ""  # an empty cell is an empty mask
        rows.append(f"{k}.png,{label},{mask}")
    table = csv_tree(tmp_path, "filename,label,mask", rows)
    splits = benchmarks.load_task("csv", tmp_path, table)
    assert splits.kind == "mask"
    for example in everything(splits):
        k = int(example.path.stem)
        assert mask_of(example).sum() == (16 * (16 - k) if k else 0)
    assert benchmarks.load_task("csv", tmp_path, table, column="label").kind == "labels"


WRONG = [  # one of each reader; test_own_table.py has the rest
    (
        "filename,label,patient_id,split",
        ["0.png,a,7,train", "1.png,b,7,test", "2.png,b,8,val"],
        "lines 2 and 3: patient 7 has films in train and in test",
    ),
    (
        "filename,mask",
        ["0.png,masks/99.png", "1.png,masks/1.png"],
        "line 2: mask .masks/99.png. is not there",
    ),
    ("name,label", ["0.png,a"], r"no column filename \(or file, .*\); its columns are name, label"),
    ("filename,age", ["0.png,51"], "no column label or mask, and none of yes and no"),
]


@pytest.mark.parametrize("header, rows, message", WRONG)
def test_csv_errors_are_one_clear_line(tmp_path, header, rows, message):
    with pytest.raises(UserError, match=message) as error:
        benchmarks.load_task("csv", tmp_path, csv_tree(tmp_path, header, rows))
    assert "\n" not in str(error.value)


@pytest.mark.skipif(not REAL.is_dir(), reason="no real films beside the repository")
def test_real_tables_are_read(tmp_path):
    table = REAL / "tasks" / "nih_pneumonia.csv"
    splits = benchmarks.load_task("csv", REAL / "films", table)
    assert splits.labels == ("pneumonia",)
    counts = splits.counts()
    assert [counts[split]["positive"]["pneumonia"] for split in SPLITS] == [162, 26, 61]


# ---------------------------------------------------------------- common rules
@pytest.mark.parametrize("name", benchmarks.TASKS)
def test_absent_files_show_the_tree(tmp_path, name):
    with pytest.raises(UserError) as error:
        benchmarks.load_task(name, tmp_path)
    if name == "csv":
        assert "--labels" in str(error.value)
    else:
        assert f"Expected for task {name}: {benchmarks.TASKS[name].tree}" in str(error.value)


def test_absent_films_are_counted(tmp_path):
    nih_tree(tmp_path)
    for name in ("00000001_000.png", "00000001_001.png"):
        next(tmp_path.rglob(name)).unlink()
    message = (
        "2 of the 14 films named by the train list are not there, "
        "the first: 00000001_000.png, 00000001_001.png"
    )
    with pytest.raises(UserError, match=message):
        benchmarks.load_task("chestxray14", tmp_path)


def test_find_root_looks_in_cxr_and_rsna_tasks_share_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("CXR", str(tmp_path))
    (tmp_path / "rsna").mkdir()
    assert benchmarks.find_root("rsna") == benchmarks.find_root("rsna_seg") == tmp_path / "rsna"
    with pytest.raises(UserError, match="no folder .*nowhere.* for task siim: give --data"):
        benchmarks.find_root("siim", tmp_path / "nowhere")
    (tmp_path / "films.pack").touch()
    with pytest.raises(UserError, match="a pack is for pretrain.py: give the folder of the films"):
        benchmarks.find_root("csv", str(tmp_path / "films.pack"))


# ---------------------------------------------------------------- what the readers rest on
def test_run_lengths_round_trip_and_follow_the_competitions_own_loop():
    rng = np.random.default_rng(1)
    for _ in range(20):
        mask = rng.random((7, 5)) < rng.choice([0.0, 0.3, 0.7, 1.0])
        text = encode_rle(mask)
        numbers = [] if text == "-1" else [int(word) for word in text.split()]
        slow = np.zeros(35)  # mask_functions.py: rle2mask
        at = 0
        for gap, length in zip(numbers[::2], numbers[1::2], strict=True):
            at += gap
            slow[at : at + length] = 1
            at += length
        assert np.array_equal(slow.reshape(5, 7).T.astype(bool), mask)
        assert text == "-1" or np.array_equal(decode_rle(text, 7, 5), mask)


# ---------------------------------------------------------------- shares
LISTED = {  # films in train, val and test of the published lists
    "shenzhen": (463, 65, 134),
    "chestxray14": (75312, 11212, 25596),
    "rsna": (21295, 2680, 2709),
    "rsna_seg": (21295, 2680, 2709),
    "chestdr": (783, 196, 1161),
}


@pytest.mark.parametrize("task", benchmarks.TASKS)
def test_validation_is_a_tenth_of_train_where_no_list_names_it(task):
    """Sec. B.3: "10% of the training data is used for validation"; listed splits stay."""
    train, val, test = benchmarks.TASKS[task].sizes
    if task in LISTED:
        assert (train, val, test) == LISTED[task]
    else:
        assert val / (train + val) == pytest.approx(0.1, abs=1e-4)


def test_own_films_are_divided_72_8_20_and_those_with_a_test_column_nine_to_one(tmp_path):
    names = [f"{k:03d}.png" for k in range(100)]
    for name in names:
        Image.new("L", (8, 8)).save(tmp_path / name)
    lines = [f"{name},{'mass' if k % 2 else 'normal'}" for k, name in enumerate(names)]
    table = tmp_path / "own.csv"
    table.write_text("filename,label\n" + "\n".join(lines) + "\n")
    assert sizes(benchmarks.load_task("csv", tmp_path, table)) == [72, 8, 20]
    lines = [f"{line},{'test' if k < 40 else 'train'}" for k, line in enumerate(lines)]
    table.write_text("filename,label,split\n" + "\n".join(lines) + "\n")
    assert sizes(benchmarks.load_task("csv", tmp_path, table)) == [54, 6, 40]
