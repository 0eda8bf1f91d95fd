"""What an analysis looks at, which weights and which films, and where its results go. Shared by the commands of analyze.py."""

import dataclasses
from pathlib import Path

import numpy as np
import torch

import augment
from data import open_films
from plumbing import phantom, pictures
from plumbing.checkpoint import write_json
from plumbing.film import UnreadableFilm
from plumbing.launch import UserError, flag, parse, start_team
from plumbing.table import match, read_table

OTHER_PATIENTS = 1000  # added to the seed: a population of phantoms that the demo has not seen


@dataclasses.dataclass
class Common:
    weights: str = flag(
        None,
        "last.pt or encoder.pt of a run or its folder, the authors' file, a timm ViT [newest pre-training run under runs/]",
    )
    data: str = flag(None, "folder of films or a .pack file [synthetic films, drawn into --out]")
    out: str = flag(None, "folder of the results [runs/COMMAND]")
    table: str = flag(
        None,
        "CSV about the films; only those it names are used, of them the test split where it has one",
    )
    films: int = flag(50, "films to look at, evenly from all")
    seed: int = flag(0, "of everything random")
    device: str = flag("auto", "auto, cpu, cuda or cuda:1")


def find_weights(config):
    """The weights asked for, else those of the newest pre-training run. Prints the choice. → path"""
    if config.weights:
        path = Path(config.weights)
        if path.is_dir():
            path = path / "last.pt" if (path / "last.pt").is_file() else path / "encoder.pt"
    else:
        found = sorted(Path("runs").rglob("encoder.pt"), key=lambda p: p.stat().st_mtime)
        if not found:
            raise UserError(
                "no pre-training run (encoder.pt) under runs/: run pretrain.py, or give --weights FILE"
            )
        path = (
            found[-1].with_name("last.pt")
            if found[-1].with_name("last.pt").is_file()
            else found[-1]
        )
    print(f"weights {path}", flush=True)
    return path


def open_set(config, count, side=320):
    """The films of --data, or synthetic ones with their table. → (films, path of the table or None)"""
    out = Path(config.out)
    if config.data:
        films = open_films(config.data, out, side)
        print("\n".join(films.summary), flush=True)
        return films, config.table
    folder = out / f"phantoms_{count}_{config.seed}"
    if not (folder / "phantoms.csv").is_file():
        phantom.write_phantoms(folder, count, size=128, seed=OTHER_PATIENTS + config.seed)
    return open_films(folder / "films", out, side), config.table or folder / "phantoms.csv"


def rows_of(table, films):
    """Rows of a CSV with a column filename whose films are there, by path tail; of the split `test` where rows have one. → [(film's number, row)]"""
    if not Path(table).is_file():
        raise UserError(f"--table {table}: no such file")
    rows = read_table(table)
    if not rows or "filename" not in rows[0]:
        raise UserError(
            f"--table {table}: a column filename is wanted, found {', '.join(rows[0]) if rows else 'nothing'}"
        )
    rows = [r for r in rows if r.get("split", "").lower() == "test"] or rows
    by_name = {r["filename"]: r for r in rows}
    found = [
        (i, by_name[name]) for i, name in enumerate(match(films.names, by_name)) if name is not None
    ]
    if not found:
        raise UserError(
            f"--table {table}: none of its {len(rows)} films is in the data (first: {rows[0]['filename']})"
        )
    return found


def named(table, films):
    """Numbers of the films that the table names; all without one."""
    return np.array([i for i, _ in rows_of(table, films)]) if table else np.arange(len(films))


def evenly(numbers, count):
    """At most `count` of the numbers, evenly from all."""
    if count < 1:
        raise UserError(f"{count} films asked for: at least one is needed")
    return numbers[np.linspace(0, len(numbers) - 1, min(count, len(numbers))).astype(int)]


def read_whole(films, numbers, size):
    """The readable ones of these films, squeezed to (size, size). → (images (n, 1, size, size), their numbers, {name of a bad film: reason})"""
    images, good, bad = [], [], {}
    for i in map(int, numbers):
        try:
            film = films[i]
        except UnreadableFilm as reason:
            bad[films.names[i]] = str(reason)
            continue
        images.append(augment.crop(film, (0, 0, *film.shape), size))
        good.append(i)
    images = np.stack(images) if images else np.zeros((0, size, size), np.uint8)
    return augment.to_float(torch.from_numpy(images))[:, None], np.array(good, int), bad


def some_films(films, table, count, size):
    """About `count` films, evenly from those that the table names; Stop when none can be read. → images (n, 1, size, size)"""
    images, _, bad = read_whole(films, evenly(named(table, films), count), size)
    if not len(images):
        raise UserError(
            f"none of {len(bad)} films can be read; python data.py check --data … says why"
        )
    return images


def grey(image):
    """(1, H, W) float → uint8 (H, W)"""
    return (255 * image[0].clamp(0, 1)).round().byte().cpu().numpy()


def finish(config, result, words, **pages):
    """Write the pictures and, last, result.json; say where they are."""
    out = Path(config.out)
    for name, page in pages.items():
        pictures.save(page, out / f"{name}.png")
    write_json(out / "result.json", result)
    print(
        words
        + "\n"
        + ", ".join(f"{out}/{name}.png" for name in pages)
        + f", numbers {out}/result.json"
    )


def whole(films, indices, size):
    """Films as the models see them whole: squeezed to (size, size), antialiased. → float (n, 1, size, size) in [0, 1]"""
    images = [
        augment.crop(film, (0, 0, *film.shape), size) for film in (films[int(i)] for i in indices)
    ]
    return augment.to_float(torch.from_numpy(np.stack(images)))[:, None]


@torch.no_grad()
def pooled(encoder, images, batch=128):
    """Mean over all output tokens, the feature that the paper fine-tunes on (B.3). (n, 1, H, W) → (n, D) float32 on the CPU"""
    device = next(encoder.parameters()).device
    return torch.cat(
        [encoder(part.to(device)).float().mean(1).cpu() for part in images.split(batch)]
    )


def readable(films, indices):
    """Those of `indices` whose film can be read."""
    good = []
    for i in indices:
        try:
            films[int(i)]
            good.append(int(i))
        except UnreadableFilm:
            pass
    return np.array(good, dtype=int)


def run_command(Config, command, name):
    """Parse the flags of one `python -m lab.NAME`, make its folder, run it on its device."""
    config = parse(Config, f"{command.__doc__}", prog=f"python -m lab.{name}")
    config.out = config.out or f"runs/{name}"
    try:
        Path(config.out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {config.out}: {error.strerror}") from None
    command(config, start_team(config.device).device)
