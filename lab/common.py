"""What every analysis needs: its flags, its weights and films, and the folder of its results.

An analysis NAME is a program of its own, `python -m lab.NAME`: `main` reads the flags and finds the
weights (`start`), opens films (`open_set`), and leaves result.json and its pictures in --out
(`finish`). Synthetic films are of patients that no demo was trained on.
"""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import augment
from data import open_films
from model import CheXWorld
from plumbing import checkpoint, phantom, pictures
from plumbing.film import UnreadableFilm
from plumbing.launch import UserError, count_cpus, count_memory, flag, parse, start_team
from plumbing.own_table import Labels, read_patient_table
from plumbing.splits import hold_out_films, patients_of
from plumbing.table import Finder, Sheet, read_list
from plumbing.weights import load_world, make_vit

OTHER_PATIENTS = 1000  # added to the seed of phantoms: the demo was trained on none of these
NOBODY = (set(), set())  # what trained_on would say of those
FILES = {"weights", "data", "table", "reference", "patients", "learn", "show"}  # flags of files


@dataclasses.dataclass
class AboutFilms:
    data: str = flag(None, "folder of films or a .pack file [synthetic films, drawn into --out]")
    out: str = flag(None, "folder of the results [runs/NAME]")
    table: str = flag(None, "CSV about the films: only those it names; with a split only its test")
    films: int = flag(50, "films to look at, evenly from all")
    seed: int = flag(0, "of everything random")
    device: str = flag("auto", "auto, cpu, cuda, cuda:1 or mps")


@dataclasses.dataclass
class Common(AboutFilms):
    weights: str = flag(
        None,
        "a run, its last.pt or encoder.pt, the authors' file, another ViT [newest run below runs/, "
        "be it the demo]",
    )


def start(Config, doc, name, argv=None):
    """Read the flags of `python -m lab.NAME`, find the weights, and make the folder --out.

    UserError when that holds the result of other weights or settings, or of another program.
    → (args, device)
    """
    args = parse(Config, doc, argv, prog=f"python -m lab.{name}")
    args = dataclasses.replace(args, out=args.out or f"runs/{name}")
    if hasattr(args, "weights"):
        args = dataclasses.replace(args, weights=str(find_weights(args.weights)))
    out = Path(args.out)
    checkpoint.refuse_other_program(out, checkpoint.ANALYSIS)
    saved = checkpoint.read_json(out / "result.json")
    if saved:
        checkpoint.refuse_other_recipe(out, saved["settings"], settings_of(args), or_else="")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {args.out}: {error.strerror}") from None
    return args, start_team(args.device).device


def settings_of(args):
    """Name what a result rests on: all flags but --out and --device, files by their whole paths."""
    settings = dataclasses.asdict(args)
    del settings["out"], settings["device"]
    files = {name: settings[name] for name in FILES & settings.keys()}
    return settings | checkpoint.sources(**files)


def finish(args, result, words, **pages):
    """Write the pictures and, last, result.json; print the results and where they are.

    args: as `start` gave them, which compares them with those of the next call.
    """
    out = Path(args.out)
    for name, page in pages.items():
        pictures.save(page, out / f"{name}.png")
    checkpoint.write_json(out / "result.json", {"settings": settings_of(args), **result})
    files = [f"{out}/{name}.png" for name in pages] + [f"numbers {out}/result.json"]
    print(words)
    print(", ".join(files))


def columns(rows):
    """Lay rows of cells out below each other: the first at the left, all others right. → text"""
    widths = [max(map(len, column)) for column in zip_longest(*rows, fillvalue="")]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=False)]
        cells[0] = row[0].ljust(widths[0])
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)


def select(found, rows):
    """Take some rows of {name: array (n, …)}."""
    return {name: values[rows] for name, values in found.items()}


# ---------------------------------------------------------------- weights
def find_weights(weights: str | None) -> Path:
    """Find the weights asked for, or those of the newest pre-training run, and print their path.

    Of a run, last.pt goes before encoder.pt.
    """
    newest = None if weights else checkpoint.newest_run()
    if not weights and newest is None:
        raise UserError("no pre-training run in runs/: run pretrain.py, or give --weights FILE")
    path = checkpoint.weights_in(weights or newest.parent)
    print("\n".join([f"weights {path}", *checkpoint.warn_of_unfinished(path)]), flush=True)
    return path


def load_predictions(path) -> CheXWorld:
    """Load a world model whose predictions of features are asked for. Raises BadCheckpoint."""
    world = load_world(path)
    if world.pixel_weight == 1:
        raise checkpoint.BadCheckpoint(
            f"{path}: trained with --pixels 1, so it never learnt to predict features; its encoder "
            "serves finetune.py, lab.features, lab.health and lab.correspondence"
        )
    return world


def random_twin(vit, seed):
    """Make the same network with random weights, on the same device: what all are compared with."""
    torch.manual_seed(seed)
    return make_vit(vit.config).to(next(vit.parameters()).device).eval()


# ---------------------------------------------------------------- films
def open_set(args, count, side=320, patients=None):
    """Open the films of --data, or draw `count` synthetic ones, which have a table.

    side, patients: as in data.open_films. → (films, path of the table or None)
    """
    out = Path(args.out)
    if args.data:
        films = open_films(args.data, out, side, patients)
        print("\n".join(films.summary), flush=True)
        return films, args.table
    folder = out / f"phantoms_{count}_{args.seed}"
    if not (folder / "phantoms.csv").is_file():
        phantom.write_phantoms(folder, count, size=128, seed=OTHER_PATIENTS + args.seed)
    return open_films(folder / "films", out, side), args.table or folder / "phantoms.csv"


def rows_of(table, films, said=lambda row: None, split="test"):
    """Find the rows of a CSV whose films are there; only those of one split where it has
    such. Its columns of films and splits go by any of their usual names (plumbing.words). Of
    several rows of a film the first counts. UserError when a row fits two films, or when two rows
    of a film differ in what is wanted of them, said(row). → [(the film's number, row)]
    """
    if not Path(table).is_file():
        raise UserError(f"--table {table}: no such file")
    sheet = Sheet(table)
    film = sheet.film
    rows = [
        dict(zip(sheet.cells, row, strict=True)) for row in zip(*sheet.cells.values(), strict=True)
    ]
    numbers = range(len(rows))
    if sheet.split and split:
        is_wanted = [own == split for own in sheet.splits()]
        numbers = [k for k in numbers if is_wanted[k]] or numbers
        said_of = f"{len(numbers)} of {len(rows)} rows, column {sheet.split}"
        if not any(is_wanted):
            said_of = f"all {len(rows)} rows, for column {sheet.split} says {split} of none"
        print(f"table {table}: {said_of}", flush=True)
    found = {}
    absent = 0
    names = [rows[k][film] for k in numbers]
    lines = [sheet.lines[k] for k in numbers]
    places = Finder(films.names).find_one(names, sheet.path, lines)
    for k, place in zip(numbers, places, strict=True):
        absent += not place.films
        for i in place.films:
            if said(found.setdefault(i, rows[k])) != said(rows[k]):
                sheet.refuse(f"{rows[k][film]} stands twice, and differs: keep one row", k)
    if not found:
        raise UserError(
            f"--table {table}: none of its {len(rows)} films is in the data "
            f"(first: {rows[numbers[0]][film]})"
        )
    if absent:
        print(f"table {table}: {absent} of {len(numbers)} films are not in the data", flush=True)
    return sorted(found.items(), key=lambda item: item[0])


def named(table, films, split="test"):
    """Numbers of the films that a table names, as rows_of does, or a list (.txt), a film per line;
    of all films without a table.
    """
    if not table:
        return np.arange(len(films))
    if not str(table).endswith(".txt"):
        return np.array([i for i, _ in rows_of(table, films, split=split)])
    names = [name for name, _ in read_list(Path(table))] if Path(table).is_file() else []
    found = sorted({i for place in Finder(films.names).find(names) for i in place.films})
    if not found:
        raise UserError(f"{table}: no list of films, or none of its {len(names)} is in the data")
    return np.array(found)


def evenly(numbers, count):
    """Choose at most `count` of the numbers, evenly from all."""
    if count < 1:
        raise UserError(f"{count} films asked for: at least one is needed")
    return numbers[np.linspace(0, len(numbers) - 1, min(count, len(numbers))).astype(int)]


def patients_with(films, tables):
    """The patient of every film: as its folder tells, else as one of the tables does. → (n,)"""
    patients = list(films.patients)
    for table in tables:
        if str(table).endswith(".txt"):
            continue
        sheet = Sheet(table)
        names = sheet.cells[sheet.film]
        is_here = any(place.films for place in Finder(films.names).find(names))
        if not is_here or not sheet.patient:
            continue
        told, _ = read_patient_table(table, films.names)
        for i, name in enumerate(films.names):
            if patients[i] == name:
                patients[i] = told.get(name, name)
    return np.array(patients)


def run_of(weights):
    """The settings of the run that made the weights, from config.json beside them; {} without."""
    run = checkpoint.read_json(Path(weights).parent / "config.json")
    if not (run.get("out") and run.get("data")):  # of another program
        return {}
    phantoms = Path(run["out"]) / "phantoms"
    if run.get("probe") is None and Path(run["data"]) == phantoms / "films":
        run["probe"] = str(phantoms / "phantoms.csv")  # version 0.1 did not write down the demo's
    return run


def trained_on(weights, films, of_all=True):
    """Find the films that a world model was trained on, and their patients. → two sets of names

    The hold-out of its run is repeated on the films given and, when that is not it, on the run's
    own; the list that comes out must have the digest in the checkpoint. None when nobody can tell,
    as of a run with --weights: nobody knows what these had seen; of_all=False asks of that run
    alone. For an encoder.pt, the last.pt beside it tells.
    """
    last = Path(weights)
    if last.name == "encoder.pt":
        last = last.with_name("last.pt")
    run = run_of(last)
    if not run or not last.is_file():
        return None
    recipe = checkpoint.load_checkpoint(last, mmap=True).get("recipe", {})
    if of_all and "weights" in recipe:
        return None
    for data in dict.fromkeys((str(films.root), run["data"])):
        try:
            own = open_films(data, patients=run["patients"])
            paths = (run["probe"] or "").split(",")
            tables = [Labels(path, own).complete() for path in paths if path]
            train, _ = hold_out_films(own, tables, run["holdout"], run["seed"])
        except UserError:  # films or tables have gone
            continue
        names = [own.names[i] for i in train]
        if checkpoint.digest_of_names(names) == recipe.get("names"):
            patients = np.array(patients_of(own, tables))
            return set(names), set(patients[train].tolist())
    return None


def known_from(args, films):
    """What `trained_on` says of args.weights; of films that are drawn here nobody is known."""
    return trained_on(args.weights, films) if args.data else NOBODY


def seen_by(learnt, films, patients):
    """Tell of which films the world model knows the film itself or its patient. → (n,) bool

    learnt: what trained_on says; where nobody can tell, it may know all.
    """
    if learnt is None:
        return np.ones(len(films), bool)
    names, others = learnt
    is_seen = np.isin(patients, list(others))
    for place in Finder(films.names).find(sorted(names)):
        is_seen[list(place.films)] = True
    return is_seen | np.isin(patients, np.array(patients)[is_seen])


def seen_words(learnt, parts: dict) -> str:
    """Say how many films show patients that the world model was trained on.

    learnt: what trained_on says; parts: {what the films are for: is_seen (n,)}
    """
    if learnt is None:
        return "nobody can tell which of these films pre-training saw, unlabelled"
    counts = [f"{is_seen.sum():,} of {len(is_seen):,} {what}" for what, is_seen in parts.items()]
    return (
        f"films whose patients pre-training saw, unlabelled: {', '.join(counts)}, by name "
        "(renamed copies cannot be told)"
    )


def say_seen(args, parts: dict, table=None) -> tuple[str, list[float]]:
    """Print how many of the films asked about pre-training may know.

    parts: {what the films are for: (Films, their numbers)}.
    → the words, for result.json; the share that is known, of each part
    """
    (first, _), *_ = parts.values()
    learnt = known_from(args, first)
    is_seen = {}
    for what, (films, numbers) in parts.items():
        patients = patients_with(films, [table] if table else [])
        is_seen[what] = seen_by(learnt, films, patients)[numbers]
    words = seen_words(learnt, is_seen)
    print(words, flush=True)
    return words, [float(seen.mean()) for seen in is_seen.values()]


def read_whole(films, numbers, size):
    """Read films as the models see them whole: squeezed to (size, size), antialiased.

    → images (n, 1, size, size), float in [0, 1], of those that can be read; their numbers (n,);
    {name of an unreadable film: reason}
    """
    images = []
    read = []
    unreadable = {}

    def attempt(i):
        try:
            film = films[i]
        except UnreadableFilm as reason:
            return str(reason)
        return augment.crop(film, (0, 0, *film.shape), size)

    numbers = [int(i) for i in numbers]
    with ThreadPoolExecutor(count_cpus()) as threads:  # decoding runs beside Python
        for i, image in zip(numbers, threads.map(attempt, numbers), strict=True):
            if isinstance(image, str):
                unreadable[films.names[i]] = image
            else:
                images.append(image)
                read.append(i)
    images = np.stack(images) if images else np.zeros((0, size, size), np.uint8)
    images = augment.to_float(torch.from_numpy(images))[:, None]
    return images, np.array(read, int), unreadable


def map_films(function, films, numbers, size, words="films", batch=32):
    """Apply a function to films as `read_whole` reads them, batch by batch; UserError without any.

    function: images (b, 1, size, size) → {name: array (b, …)}
    All arrays are held in memory: UserError after the first batch when that is too small for them.
    → {name: array (n, …)}, numbers of the readable films (n,), {name of an unreadable film: reason}
    """
    whole = {}
    readable = []
    unreadable = {}
    for first in tqdm(range(0, len(numbers), batch), desc=words, leave=False):
        images, read, failed = read_whole(films, numbers[first : first + batch], size)
        unreadable |= failed
        done = len(readable)
        readable.extend(read)
        found = function(images) if len(read) else {}
        whole = whole or allocate(found, len(numbers))
        for name, array in found.items():
            whole[name][done : len(readable)] = array
    require_readable(readable, words)
    return select(whole, slice(len(readable))), np.array(readable), unreadable


def allocate(found, count):
    """Make arrays for what is found of `count` films, {name: array (b, …)} of the first of them.

    UserError when they would take more than four fifths of the machine's memory.
    """
    needed = count * sum(array[0].nbytes for array in found.values())
    allowed = 0.8 * count_memory()
    if needed > allowed:
        raise UserError(
            f"what is computed of {count:,} films takes {needed / 1e9:,.1f} GB, more than four "
            f"fifths of this machine's memory, {allowed / 1e9:,.1f} GB: take fewer, such as "
            f"--films {int(count * allowed / needed)}"
        )
    return {name: np.empty((count, *a.shape[1:]), a.dtype) for name, a in found.items()}


def require_readable(read, what="films"):
    """UserError when no film was read."""
    if not len(read):
        raise UserError(f"none of the {what} can be read; python data.py check --data … says why")
