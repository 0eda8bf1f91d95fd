"""README and docs tell the truth: commands, flags, functions, quoted lines, pictures, tables."""

import ast
import contextlib
import csv
import io
import re
import runpy
import sys
import textwrap
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from scipy import stats

from lab import runs
from model import ViT
from plumbing.benchmarks import load_task
from plumbing.folder import Index
from plumbing.own_table import Labels

pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules")  # runpy's
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / ".github" / "CONTRIBUTING.md",
]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
OTHER_PROGRAMS = {"--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint"}  # torchrun's
OTHER_PROGRAMS |= {"--index-url", "--check", "--signal"}  # pip's, ruff's and Slurm's


def text_of(page):
    """A page as text; of the changelog's table of commands only what is valid now."""
    text = page.read_text()
    if page.name == "changelog.md":
        text = re.sub(r"^\| [^|]* \|", "|", text, flags=re.M)
    return text


TEXTS = {page.relative_to(ROOT).as_posix(): text_of(page) for page in PAGES}
README = TEXTS["README.md"]
RESULTS = TEXTS["docs/results.md"]


def lines_of_commands(text):
    """Lines of the code blocks that are no Python or CSV, and inline `python …`, `torchrun …`."""
    for kind, block in BLOCK.findall(text):
        if kind in ("", "bash", "sh"):
            yield from block.replace("\\\n", " ").splitlines()
    yield from re.findall(r"`((?:python|torchrun) [^`]*)`", text)


def calls():
    """Every call of a program of ours in the pages → {(program, sub-command words): {flags}}."""
    found = {}
    for text in TEXTS.values():
        for line in lines_of_commands(text):
            for part in line.split("#")[0].split("&&"):
                called = re.search(
                    r"(?:python|torchrun)\s.*?(?:-m ([\w.]+)|\b(\w+\.py))((?: [a-z]\w*)*)(.*)", part
                )
                if called and called[1] not in ("pip", "venv", "lab.NAME"):
                    program = (called[1] or called[2], tuple(called[3].split()))
                    flags = re.findall(r"(?<![\w-])(--\w+)", re.sub(r'"[^"]*"', "", called[4]))
                    found.setdefault(program, set()).update(flags)
    return found


def help_of(program, words):
    """What a program of ours prints with --help, run in this process."""
    spoken = io.StringIO()
    argv, sys.argv = sys.argv, [program, *words, "--help"]
    try:
        with contextlib.redirect_stdout(spoken), contextlib.suppress(SystemExit):
            if program.endswith(".py"):
                runpy.run_path(str(ROOT / program), run_name="__main__")
            else:
                runpy.run_module(program, run_name="__main__")
    finally:
        sys.argv = argv
    return spoken.getvalue()


@pytest.fixture(scope="module")
def helps():
    return {call: help_of(*call) for call in calls()}


def has_flag(text, flag):
    return re.search(rf"(?<![\w-]){flag}\b", text) is not None


def test_nothing_is_left_to_fill_in():
    for name, text in TEXTS.items():
        assert "@@" not in text, name


def test_the_two_set_up_commands_stand_word_for_word():
    assert "pip install -r requirements.txt && python pretrain.py\n" in README
    assert "pip install -r requirements.txt -r tests/requirements.txt && pytest\n" in README


def test_the_small_build_is_the_tested_one():
    pin = re.search(r"^torch==\S+", (ROOT / "requirements.txt").read_text(), re.M)[0]
    assert f"pip install {pin} --index-url https://download.pytorch.org/whl/cpu" in README


def test_readme_is_short():
    assert len(README.split()) <= 1500
    assert len(README.splitlines()) <= 200


@pytest.mark.slow
def test_every_flag_in_a_command_exists(helps):
    assert len(helps) > 8
    for call, flags in calls().items():
        assert has_flag(helps[call], "--help"), f"{call} does not explain itself"
        for flag in flags:
            assert has_flag(helps[call], flag), f"{call} has no {flag}"


@pytest.mark.slow
def test_every_flag_that_is_mentioned_exists_somewhere(helps):
    everything = "\n".join(helps.values())
    for name, text in TEXTS.items():
        if name != "docs/changelog.md":
            for span in re.findall(r"`([^`\n]+)`", BLOCK.sub("", text)):
                for flag in set(re.findall(r"(?<![\w-])--\w[\w-]*", span)) - OTHER_PROGRAMS:
                    assert has_flag(everything, flag), f"{name}: no program has {flag}"


def defines(body, dotted):
    """Is the dotted name defined in this list of statements, by def, class or assignment?"""
    first, _, rest = dotted.partition(".")
    for node in body:
        if isinstance(node, DEFINITIONS) and node.name == first:
            return not rest or defines(node.body, rest)
        if not rest and isinstance(node, (ast.Assign, ast.AnnAssign)):
            names = [n.id for n in ast.walk(node) if isinstance(n, ast.Name)]
            if first in names:
                return True
    return False


def is_defined(file, name):
    path = ROOT / file
    return path.is_file() and defines(ast.parse(path.read_text()).body, name)


def broken_references(page, text):
    """References of a page to code or files of ours that do not exist."""
    for file, name in re.findall(r"`([\w/]+\.py):([\w.]+)`", text):
        if not is_defined(file, name):
            yield f"{page}: {file}:{name}"
    for file in set(re.findall(r"`([\w./]*\w\.(?:py|md|yml|cff))`", text)):
        places = [ROOT / file, (ROOT / page).parent / file, ROOT / "docs" / file]
        if not any(place.is_file() for place in places):
            yield f"{page}: {file}"
    for module, name in re.findall(r"\b((?:lab|plumbing)\.(?!NAME)\w+)(?:\.(\w+))?", text):
        file = f"{module.replace('.', '/')}.py"
        if not (ROOT / file).is_file() or (name and not is_defined(file, name)):
            yield f"{page}: {module}.{name}"


def test_every_reference_to_code_exists():
    broken = [line for page, text in TEXTS.items() for line in broken_references(page, text)]
    assert broken == []
    assert len(re.findall(r"`[\w/]+\.py:[\w.]+`", "".join(TEXTS.values()))) > 20


def python_blocks():
    """Python blocks of all pages: (page, text before the block, block)."""
    for page, text in TEXTS.items():
        for match in BLOCK.finditer(text):
            if match[1] == "python":
                yield page, text[: match.start()], match[2]


def is_program(block):
    return block.startswith(("import ", "from "))


def bare_lines(text):
    return [line.strip() for line in text.splitlines() if line.strip()]


def test_quoted_lines_stand_in_the_named_file():
    quotations = [block for block in python_blocks() if not is_program(block[2])]
    assert quotations
    for page, before, block in quotations:
        file = re.findall(r"`(?:[\w/]*/)?(\w+\.py)(?::[\w.]+)?`", before)[-1]
        source, wanted = bare_lines((ROOT / file).read_text()), bare_lines(block)
        starts = range(len(source) - len(wanted) + 1)
        assert any(source[k : k + len(wanted)] == wanted for k in starts), f"{page}: {block[:80]}"


def test_readme_quotes_the_whole_forward():
    source = (ROOT / "model.py").read_text()
    world = next(
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef) and node.name == "CheXWorld"
    )
    forward = next(node for node in world.body if getattr(node, "name", "") == "forward")
    code = bare_lines(ast.get_source_segment(source, forward))
    quoted = [block for _, _, block in python_blocks() if "def forward" in block]
    assert [bare_lines(block) for block in quoted] == [code]


def test_the_programs_in_the_pages_run(tmp_path, monkeypatch):
    programs = [block for _, _, block in python_blocks() if is_program(block)]
    assert programs
    monkeypatch.chdir(tmp_path)
    films = tmp_path / "runs" / "demo" / "phantoms" / "films"
    films.mkdir(parents=True)
    vit = ViT(64, 8, 32, 2, 2)
    saved = {"encoder": vit.state_dict(), "config": vit.config, "step": 1}
    torch.save(saved, tmp_path / "runs" / "demo" / "encoder.pt")
    grey = np.random.default_rng(0).integers(0, 255, (90, 120), np.uint8)
    Image.fromarray(grey).save(films / "phantom_000000.png")
    for program in programs:
        names = {}
        exec(textwrap.dedent(program), names)
        assert names["features"].shape == (1, 64, 32)
        assert torch.isfinite(names["features"]).all()


def slug(heading):
    """The anchor that GitHub gives a heading."""
    kept = re.sub(r"[^\w\s-]", "", heading.strip().lower())
    return kept.replace(" ", "-")


def test_links_and_pictures_lead_somewhere():
    shown = set()
    for page, text in TEXTS.items():
        for target in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", text)):
            if target.startswith("http"):
                continue
            file, _, anchor = target.partition("#")
            path = ((ROOT / page).parent / file).resolve() if file else ROOT / page
            assert path.exists(), f"{page}: {target}"
            if path.suffix == ".png":
                shown.add(path)
                assert path.stat().st_size < 400_000, target
            if anchor:
                headings = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
                assert anchor in map(slug, headings), f"{page}: {target}"
    assert shown == {path.resolve() for path in (ROOT / "docs").glob("*.png")}


def test_line_counts_in_the_table_of_six_files():
    rows = re.findall(r"^\| \[?`(\w+\.py)`(?:\]\([^)]*\))? \| (\d+) \|", README, re.M)
    assert [file for file, _ in rows] == [
        "model.py",
        "masks.py",
        "augment.py",
        "data.py",
        "pretrain.py",
        "finetune.py",
    ]
    for file, told in rows:
        lines = len((ROOT / file).read_text().splitlines())
        words = f"{file} has {lines} lines, not {told}: renew the table of six files in README.md"
        assert abs(int(told) - lines) <= 0.1 * lines, words


def test_every_file_stands_in_the_tree():
    tree = next(block for _, block in BLOCK.findall(README) if "plumbing/" in block)
    for folder in ("plumbing", "lab"):
        for file in (ROOT / folder).glob("*.py"):
            if file.name != "__init__.py":
                assert re.search(rf"^ +{file.stem}\b", tree, re.M), f"{folder}/{file.name}"


def csv_examples():
    return [block for kind, block in BLOCK.findall(TEXTS["docs/data.md"]) if kind == "csv"]


# Of each table in docs/data.md, in its order: labels, films that count, patients, and the sum of
# the answers that are known; all told by the text around it.
OUTCOMES = [
    ("pneumonia", 5, 5, 2),
    ("Effusion Mass", 6, 6, 6),
    ("Cardiomegaly Emphysema", 5, 4, 5),
    ("Atelectasis Edema", 5, 5, 4),
    ("Cardiomegaly,Pleural Effusion", 5, 4, 3),
    ("label", 5, 5, 2),
    ("Effusion Mass", 5, 5, 4),
    ("0 1 2", 6, 6, 6),
    ("mask", 5, 5, 0),
    ("pneumonia", 5, 5, 2),
]


@pytest.mark.parametrize("table, outcome", list(zip(csv_examples(), OUTCOMES, strict=True)))
def test_the_example_tables_are_read(table, outcome, tmp_path):
    (tmp_path / "own.csv").write_text(table)
    lines = table.strip().splitlines()
    column = next(k for k, name in enumerate(lines[0].split(",")) if name in FILM_COLUMNS)
    names = [re.split("[,;]", line)[column] for line in lines[1:]]
    names += [f"masks/{name}.png" for name in re.findall(r"\d+_lungs", table)]
    for name in names:
        path = tmp_path / "films" / (name if "." in name else f"{name}.jpg")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (32, 32)).save(path)
    labels, films, patients, positive = outcome
    splits = load_task("csv", tmp_path, tmp_path / "own.csv")
    assert splits.labels == tuple(labels.split("," if "," in labels else None))
    examples = splits.train + splits.val + splits.test
    assert len(examples) == films and len({example.patient for example in examples}) == patients
    answers = [value for example in examples for value in example.truth]
    assert sum(value or 0 for value in answers) == positive
    if "split" in lines[0]:
        films = Index(tmp_path / "films").films
        unknown = SimpleNamespace(names=films, patients=films, links={})
        labels = Labels(tmp_path / "own.csv", unknown)
        assert labels.classes == list(splits.labels)


FILM_COLUMNS = ("filename", "Image Index", "dicom_id", "Path", "filename;label;patient_id;split")


def numbers_in(name):
    """The rows of a CSV of docs/ that lab.runs wrote."""
    with open(ROOT / "docs" / name, encoding="utf-8", newline="") as file:
        return [row | {"value": float(row["value"])} for row in csv.DictReader(file)]


def test_the_table_of_small_sets_is_made_from_its_numbers():
    """docs/study.csv is what lab.runs wrote; the page shows the table that it makes of it."""
    rows = numbers_in("study.csv")
    assert runs.lay_out(rows) in RESULTS


TASKS = {"local": "tasks local", "local + global": "tasks local,global"}
TASKS |= {"local + domain": "tasks local,domain"}
FULL = "batch 8, epochs 25, warmup 2.0, lr 0.00075, ema 0.9975"
LABELS = {
    "nih_pneumonia": "pneumonia, NIH",
    "kermany_pneumonia": "pneumonia, Kermany",
    "nih_sex": "sex",
    "nih_view": "view",
    "nih_age60": "age, 60 or older",
}
OWN = (runs.PRETRAINED, runs.PRETRAINED + runs.CELLS)


def table_3():
    """Table 3 in miniature, of both trainings, as results.md shows it."""
    study = runs.shown(numbers_in("study.csv"))
    lines = [["AUROC, mean / cells", *LABELS.values(), "Recall@5, with / without a", "seeds"]]
    own = [row for row in study if row["setting"] == FULL]
    own = {(row["what"], row["features"], row["value"]): row for row in own}.values()
    pixels = [runs.pair(own, table, *runs.PIXELS) for table in LABELS]
    lines.append(["raw 8² / 64² pixels", *pixels, "–", "–"])
    random = [runs.pair(own, table, runs.RANDOM, runs.RANDOM + runs.CELLS) for table in LABELS]
    lines.append([runs.RANDOM, *random, "–", "3"])
    for name, setting in [*TASKS.items(), ("full", FULL)]:
        rows = study if name == "full" else runs.shown(numbers_in("table3.csv"))
        for when in ("", ", earlier"):
            own = [row for row in rows if row["setting"] == setting + when]
            cells = [runs.pair(own, table, *OWN) for table in LABELS]
            recall = runs.pair(own, "Recall@5", runs.WAYS["action"], runs.WAYS["no_action"])
            lines.append([name + when, *cells, recall, str(runs.count_seeds(own))])
    return runs.markdown(lines)


def by_seed(rows, setting, table, features):
    """The number of every seed of a setting, the mean of its trainings. → {seed: value}"""
    found = {}
    for row in rows:
        if (row["what"], row["features"]) == (table, features):
            if row["setting"] in (setting, f"{setting}, earlier"):
                found.setdefault(row["seed"], []).append(row["value"])
    return {seed: np.mean(values) for seed, values in found.items()}


def differences_of_table_3():
    """Full minus the rows of fewer tasks, with an interval over seeds and one over patients.

    Over seeds: of both trainings, Student's t. Over patients: the second training's three seeds.
    """
    study = runs.shown(numbers_in("study.csv"))
    table_3 = numbers_in("table3.csv")
    ablated = runs.shown(table_3)
    lines = [["full minus …", *TASKS]]
    for table, label in LABELS.items():
        for features, pooling in zip(OWN, ("mean", "cells"), strict=True):
            line = [f"{label}, {pooling}"]
            for setting in TASKS.values():
                full = by_seed(study, FULL, table, features)
                less = by_seed(ablated, setting, table, features)
                apart = [full[seed] - less[seed] for seed in ("0", "1", "2")]
                over_seeds = stats.t.interval(0.95, 2, np.mean(apart), stats.sem(apart))
                about = f"full minus {setting}", table, features
                (row,) = [
                    row
                    for row in table_3
                    if (row["setting"], row["what"], row["features"]) == about
                ]
                words = f"{signed(np.mean(apart), over_seeds)}; {signed(row['value'], bounds(row))}"
                line.append(bold(words, over_seeds, bounds(row)))
            lines.append(line)
    return runs.markdown(lines)


def signed(value, bounds):
    """A difference and its interval as the page writes them."""
    return f"{value:+.1f} ({bounds[0]:.1f} to {bounds[1]:.1f})".replace("-", "−")


def bounds(row):
    """The interval of a row."""
    return float(row["low"]), float(row["high"])


def bold(words, *intervals):
    """Words, bold where each of the intervals leaves out 0."""
    is_sure = all(low * high > 0 for low, high in intervals)
    return f"**{words}**" if is_sure else words


def marked(row):
    """A difference of one run with its interval; bold where that leaves out 0."""
    return bold(signed(row["value"], bounds(row)), bounds(row))


def test_table_3_is_that_of_its_runs():
    """docs/table3.csv is what lab.runs wrote of the ablated runs; the page shows their means, and
    what the full model has beyond them."""
    chapter = RESULTS.partition("## Ablations")[2]
    assert table_3() in chapter
    assert differences_of_table_3() in chapter


def of_seeds(rows, **wanted):
    """The rows with these values, of which there is one per seed, in the order of the seeds."""
    own = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    assert [row["seed"] for row in own] == ["0", "1", "2"], wanted
    return own


def test_the_tables_of_120_epochs_are_made_from_their_numbers():
    """Of all films against raw pixels, and of the films of test."""
    setting = "batch 8, epochs 120, warmup 9.6, lr 0.00075, ema 0.9975"
    own = [row for row in numbers_in("study.csv") if row["setting"] == setting]
    own = sorted(own, key=lambda row: row["seed"])
    page = RESULTS
    for table, label in LABELS.items():
        pixels = [row for row in own if row["minus"] in runs.PIXELS and row["what"] == table]
        lead = [of_seeds(pixels, films="all", features=features) for features in OWN]
        cells = [" · ".join(map(marked, rows)) for rows in lead]
        assert f"| {label} | {cells[0]} | {cells[1]} |\n" in page
        of_test = [of_seeds(own, films="test", what=table, features=f, minus="") for f in OWN]
        values = [" · ".join(f"{row['value']:.1f}" for row in rows) for rows in of_test]
        lead = of_seeds(pixels, films="test", features=OWN[1])
        (best,) = of_seeds(own, films="test", what=table, features=lead[0]["minus"], minus="")[:1]
        lead = " · ".join(map(marked, lead))
        expected = f"| {label} | {values[0]} | {values[1]} | {best['value']:.1f} | {lead} |\n"
        assert expected in page


def test_the_table_of_continuing_is_made_from_its_numbers():
    rows = numbers_in("continue.csv")
    rows = [row for row in rows if row["films"] == "all" and row["what"] in LABELS]
    page = RESULTS.partition("### Continue")[2]
    named = {"from scratch": "from scratch on NIH, 1,525 steps", runs.RANDOM: "random weights"}
    named |= {"continued": "continued on NIH, 1,525 steps more"}
    named |= {"other films alone": "the others' films alone, 3,900 to 4,025 steps"}
    columns = [(table, pooling) for table in LABELS for pooling in ("", runs.CELLS)]
    columns = columns[:2] + columns[4:]  # no film of Kermany
    for name, words in named.items():
        cells = []
        for table, pooling in columns:
            own = of_seeds(rows, what=table, features=name + pooling, minus="")
            cells.append(" · ".join(f"{row['value']:.1f}" for row in own))
        assert f"| {words} | {' | '.join(cells)} |" in page
    for other, words in (("from scratch",) * 2, ("other films alone", "the others' films alone")):
        cells = []
        for table, pooling in columns:
            own = of_seeds(rows, what=table, features="continued" + pooling, minus=other + pooling)
            values = [f"{row['value']:+.1f}".replace("-", "−") for row in own]
            marks = map(bold, values, map(bounds, own))
            cells.append(" · ".join(marks))
        assert f"| continued − {words} | {' | '.join(cells)} | |" in page
