"""Sets of films: files and packed files as one sequence, kept in memory, checked, or packed.

A packed file holds films decoded once, which training then maps into memory. It consists of MAGIC,
the films' bytes one after the other, the index (three .npy arrays: heights and widths,
checksums, JSON text), and a footer: where the index starts, its size, its checksum, MAGIC.
"""

import contextlib
import io
import json
import os
import struct
import time
import zlib
from bisect import bisect_right
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from plumbing.checkpoint import claim, explain_writing, replace_with
from plumbing.film import UnreadableFilm, read_shrunk
from plumbing.folder import in_threads
from plumbing.launch import Loader, UserError

MAGIC = b"CXRPACK1"
FOOTER = struct.Struct("<QQI8s")


# ---------------------------------------------------------------- sets of films
class Films:
    """films[i] → uint8 (H, W), short side at most `side` px (0 = as stored); raises UnreadableFilm.

    The files below `root` come first, then what packed files hold. names: paths below the root;
    patients: who is on each film; summary: lines that say what was recognised. links: {link that
    was left out: the film it leads to}.
    """

    def __init__(self, root, patient_of, packs, side, summary, links=()):
        self.root = str(root)
        self.packs = packs
        self.side = side
        self.summary = summary
        self.links = dict(links)
        self.names = list(patient_of)
        self.patients = list(patient_of.values())
        self.file_count = len(patient_of)
        self.first_of_pack = []  # number of each pack's first film
        for pack in packs:
            self.first_of_pack.append(len(self.names))
            self.names += pack.names
            self.patients += pack.patients

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        if i < self.file_count:
            return read_shrunk(f"{self.root}/{self.names[i]}", self.side)
        pack, k = self.find_packed(i)
        return pack[k]

    def verified(self, i):
        """films[i]; a packed one is compared with its checksum first."""
        if i < self.file_count:
            return self[i]
        pack, k = self.find_packed(i)
        return pack.verified(k)

    def find_packed(self, i):
        """The pack that holds film i, and the film's number in it."""
        p = bisect_right(self.first_of_pack, i) - 1
        return self.packs[p], i - self.first_of_pack[p]


class InMemory:
    """A set of films with all its attributes that decodes each once and keeps it, or its error."""

    def __init__(self, films):
        vars(self).update(vars(films))
        self.films = films
        self.decoded = {}  # {i: film, or the error that it raised}

    def __len__(self):
        return len(self.films)

    def __getitem__(self, i):
        if i not in self.decoded:
            self.decoded[i] = self.attempt(i)
        if isinstance(self.decoded[i], UnreadableFilm):
            raise self.decoded[i]
        return self.decoded[i]

    def attempt(self, i):
        """Film i, or the error that it raises."""
        try:
            return self.films[i]
        except UnreadableFilm as error:
            return error

    def decode_all(self):
        """Decode every film now, with threads and a progress bar."""
        numbers = range(len(self))
        with ThreadPoolExecutor() as pool:
            decoded = pool.map(self.attempt, numbers)
            bar = tqdm(decoded, "decode", len(self), unit=" films", leave=False, disable=None)
            self.decoded = dict(zip(numbers, bar, strict=True))


def choose_loading(films: Films, workers: int | None, device) -> tuple:
    """Choose how films are loaded: a small set stays decoded in memory. → (films, number of loader
    processes)

    workers: what the user asked for. Films are decoded when they are first used; loader processes
    would each decode and keep them all, so films stay in memory only when this process loads them.
    """
    is_small = len(films) * 1.3 * films.side**2 < 1e9  # bytes; at most 1.3 × as long as wide
    if workers is None and device.type == "cuda":
        workers = 8
    if workers is None:
        workers = 0 if is_small else 1
    if is_small and workers == 0:
        films = InMemory(films)
    return films, workers


# ---------------------------------------------------------------- films that cannot be read
def refuse_too_many(unreadable: list[str], total: int):
    """UserError when so many films cannot be read: more than one, and more than 1 % of all."""
    if len(unreadable) > max(1, 0.01 * total):
        raise UserError(
            f"{len(unreadable):,} of {total:,} films cannot be read, more than one and more than "
            f"1 %: {', '.join(unreadable[:3])} …: a training stops once it has met so many; mend "
            "them or take them away (python data.py check --data … names them all)"
        )


class UnreadableFilms:
    """Names each film that cannot be read, once and with the reason; too many stop the run.

    total: films of the run; reasons: {name: why it cannot be read}.
    """

    def __init__(self, total):
        self.total = total
        self.reasons = {}

    def note(self, name, reason):
        """Note one film. UserError when it is one too many."""
        if name in self.reasons:
            return
        self.reasons[name] = reason
        tqdm.write(f"bad film, skipped ({len(self.reasons)} so far): {name}: {reason}")
        refuse_too_many(list(self.reasons), self.total)

    def note_batch(self, batch):
        """Note the films of a loaded batch that another one stands in for."""
        for name, reason in zip(batch["unreadable"], batch["reason"], strict=True):
            if name:
                self.note(name, reason)


# ---------------------------------------------------------------- reading a packed file
class Pack:
    """pack[i] → uint8 (H, W), a read-only view of the mapped file.

    names, patients: of the films; side: their short side, px, at most; unreadable: [[name, reason]]
    of the films that were left out; folder: name of the folder that was packed; states: what file
    each film came from, see state_of_file; summary: one line that says what it is. Raises UserError
    when the file is cut short or something else.
    """

    def __init__(self, path):
        self.path = str(path)
        index = read_index(path)
        self.index_checksum = zlib.crc32(index)
        self.bytes = self.map()  # now, so that a pack made anew does not change a run that reads it
        stream = io.BytesIO(index)
        self.shapes = np.load(stream, allow_pickle=False)  # (n, 2)
        self.checksums = np.load(stream, allow_pickle=False)  # (n,) CRC-32
        about = json.loads(np.load(stream, allow_pickle=False).tobytes())
        if not {"names", "patients", "side", "bad", "folder"} <= about.keys():
            raise UserError(f"{path}: packed by another version: make it again")
        self.offsets = film_offsets(self.shapes)  # (n + 1,)
        self.names = about["names"]
        self.patients = about["patients"]
        self.side = about["side"]
        self.unreadable = about["bad"]
        self.folder = about["folder"]
        # Of the films and then the unreadable ones; a pack of an earlier version does not know.
        count = len(self.names) + len(self.unreadable)
        self.states = about.get("states", [None] * count)
        size = f"short side at most {self.side or 'as it was'}"
        self.summary = f"{path}: {len(self.names):,} packed films, {size}"

    def __len__(self):
        return len(self.names)

    def __getstate__(self):
        return {**self.__dict__, "bytes": None}

    def map(self) -> np.ndarray:
        """Map the file, uint8 (bytes,). UserError when it is no longer the one that was opened."""
        mapped = np.asarray(np.memmap(self.path, np.uint8, "r"))
        _, _, checksum, _ = FOOTER.unpack(mapped[-FOOTER.size :].tobytes())
        if checksum != self.index_checksum:
            raise UserError(f"{self.path} has been made anew since it was opened: start again")
        return mapped

    def __getitem__(self, i: int) -> np.ndarray:
        if self.bytes is None:  # in a worker process that got the rest as a pickle
            self.bytes = self.map()
        return self.bytes[self.offsets[i] : self.offsets[i + 1]].reshape(self.shapes[i])

    def verified(self, i: int) -> np.ndarray:
        """Film i, after comparing it with its checksum; UnreadableFilm when they differ."""
        if zlib.crc32(self[i]) != self.checksums[i]:
            raise UnreadableFilm(f"its bytes in {self.path} have changed since packing")
        return self[i]


def read_index(path) -> bytes:
    """The bytes of a packed file's index, found by its footer and compared with their checksum."""
    try:
        with open(path, "rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - FOOTER.size))
            footer = file.read().rjust(FOOTER.size, b"\0")  # a shorter file has none
            start, size, checksum, magic = FOOTER.unpack(footer)
            if magic == MAGIC:
                file.seek(start)
                index = file.read(size)
    except OSError as error:
        raise UserError(f"{path}: not a packed file ({error})") from None
    if magic != MAGIC or zlib.crc32(index) != checksum:
        raise UserError(
            f"{path}: not a packed file, which python data.py pack makes, or one cut short; "
            "a folder of films or a whole packed file is wanted"
        )
    return index


def film_offsets(shapes) -> np.ndarray:
    """Where each film begins in the file and the last one ends, bytes. (n, 2) → int64 (n + 1,)"""
    sizes = np.prod(np.reshape(shapes, (-1, 2)), axis=1, dtype=np.int64)
    return len(MAGIC) + np.concatenate([[0], np.cumsum(sizes)])


class Attempts(torch.utils.data.Dataset):
    """Item i → (film i, "") or (None, why it cannot be read): reading that never raises.

    taken: {number of a film: its number in the pack `old`}, from which it is taken.
    """

    def __init__(self, films, old=None, taken=None):
        self.films = films
        self.old = old
        self.taken = taken or {}

    def __len__(self):
        return len(self.films)

    def __getitem__(self, i):
        if i in self.taken:
            with contextlib.suppress(UnreadableFilm):  # damaged there: read its file again
                return self.old.verified(self.taken[i]), ""
        try:
            return self.films.verified(i), ""
        except UnreadableFilm as error:
            return None, str(error)


def read_all(films: Attempts, start: int, workers: int, task: str) -> Iterator[tuple]:
    """Read all films from number `start` on, in order: yields (film or None, reason).

    workers: processes that read; task: the word before the progress bar.
    """
    loader = Loader(
        films,
        batch_size=None,
        sampler=range(start, len(films)),
        num_workers=workers,
        collate_fn=tuple,
        prefetch_factor=16 if workers else None,
    )
    return tqdm(loader, desc=task, initial=start, total=len(films), unit=" films", disable=None)


def check_and_report(films, workers: int):
    """Read every film; name those that cannot be read, with their reasons (data.py check).

    UserError when they are so many that training would stop.
    """
    began = time.time()
    unreadable = []
    read = read_all(Attempts(films), 0, workers, "check")
    for name, (film, reason) in zip(films.names, read, strict=True):
        if film is None:
            tqdm.write(f"bad: {name}: {reason}")
            unreadable.append(name)
    share = len(unreadable) / len(films)
    rate = len(films) / (time.time() - began)
    print(
        f"{len(films) - len(unreadable):,} of {len(films):,} films can be read, "
        f"{len(unreadable):,} bad ({share:.2%}); {rate:.0f} films/s with {workers} workers"
    )
    refuse_too_many(unreadable, len(films))


# ---------------------------------------------------------------- writing it
def path_of_pack(out) -> Path:
    """The file that --out names; it ends in .pack, by which packs are known below a folder."""
    out = Path(out)
    if out.is_dir():
        raise UserError(f"--out {out} is a folder: give the file to write, {out / 'cxr.pack'} say")
    return out if out.suffix == ".pack" else out.with_name(f"{out.name}.pack")


def pack_and_report(films, out, workers: int):
    """Pack the films; say how fast, how big, which were left out (data.py pack).

    A pack that is there already is made anew where films have come or changed since; what has not
    changed is taken over from it.
    """
    out = path_of_pack(out)
    began = time.time()
    claim(out.with_name(f".{out.name}.lock"), out)
    states = states_of(films)
    old = Pack(out) if out.exists() else None
    taken = renew(films, states, old) if old else {}
    if taken is None:
        packed = old
        rate = "already there"
    else:
        packed = pack_films(films, out, workers, states, old, taken)
        rate = f"{len(films) / (time.time() - began):.0f} films/s with {workers} workers"
    for name, reason in packed.unreadable:
        print(f"bad, left out: {name}: {reason}")
    print(
        f"{out}: {len(packed):,} films, short side {packed.side}, {out.stat().st_size:,} "
        f"bytes; {rate}"
    )


def state_of_file(path) -> list[int] | None:
    """A file's size and when it was last modified, ns: these change when another replaces it."""
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return [stat.st_size, stat.st_mtime_ns]


def states_of(films) -> list:
    """state_of_file of every film; None of those that come from packed files themselves."""
    files = [f"{films.root}/{name}" for name in films.names[: films.file_count]]
    return in_threads(state_of_file, files) + [None] * (len(films) - films.file_count)


def renew(films, states: list, old: Pack) -> dict | None:
    """Which films the pack `old` still holds as they are, {number: number there}.

    None: all of them, nothing is to be packed.

    states: of the films. UserError when `old` was made otherwise, or when films have come while
    others have gone: what is no longer there cannot be made again, so nobody else decides.
    """
    if old.side != films.side:
        raise UserError(
            f"{old.path} was packed at --side {old.side}, not {films.side}: choose another --out, "
            "or delete it"
        )
    number = {name: i for i, name in enumerate(films.names)}
    names = old.names + [name for name, _ in old.unreadable]
    gone = [name for name in names if name not in number]
    same = {}  # {number of a film: its place in `names`}
    for place, (name, state) in enumerate(zip(names, old.states, strict=True)):
        i = number.get(name)
        if i is not None and state in (None, states[i]):
            same[i] = place
    new = len(films) - (len(names) - len(gone))
    changed = len(films) - len(same) - new
    patients = dict(zip(films.names, films.patients, strict=True))
    told = zip(old.names, old.patients, strict=True)
    has_same_patients = all(patients.get(name, who) == who for name, who in told)
    if gone:
        words = f"{len(gone):,} of the {len(names):,} films in {old.path} are no longer there"
        if new or changed or not has_same_patients:
            others = "the patients of others are" if not (new or changed) else f"{new:,} are"
            raise UserError(
                f"{words} (first {gone[0]}), {others} new: choose another --out, or delete it"
            )
        print(f"warning: {words}, first {gone[0]}; they stay in the pack")
        return None
    if not new and not changed and has_same_patients:
        return None
    others = "" if has_same_patients else "; patients are others than before"
    print(f"{old.path} is made anew: {new:,} films are new, {changed:,} have changed since{others}")
    return {i: place for i, place in same.items() if place < len(old.names)}


def pack_films(films, out, workers=0, states: list | None = None, old=None, taken=None) -> Pack:
    """Write every readable film into the packed file `out`.

    states: of the films, see states_of. old, taken: see Attempts.
    Killed at any moment, the same call resumes where it was: until the file is complete there is
    <out>.part, and <out>.journal with a line per film, written after the film's bytes: what it was
    made from, [side, name, state], and what it became, [height, width, CRC-32, reason], which are
    zeros and the reason for a film that cannot be read.
    """
    part = Path(f"{out}.part")
    journal = Path(f"{out}.journal")
    states = states_of(films) if states is None else states
    sources = [[films.side, *each] for each in zip(films.names, states, strict=True)]
    with explain_writing(part):
        rows = take_up(part, journal, sources)
    # Unbuffered, so that closing them after an error does not try again.
    with open(part, "ab", 0) as file, open(journal, "ab", 0) as log:
        rest = read_all(Attempts(films, old, taken), len(rows), workers, "pack")
        for source, (film, reason) in zip(sources[len(rows) :], rest, strict=True):
            content = b"" if film is None else film.tobytes()
            height, width = (0, 0) if film is None else film.shape
            rows.append([height, width, zlib.crc32(content), reason])
            with explain_writing(part):
                write_wholly(file, content)  # before its line says so
                write_wholly(log, journal_line(source, rows[-1]))
    with explain_writing(out):
        append_index(part, films, rows, states)
        os.replace(part, out)
        journal.unlink()
    return Pack(out)


def journal_line(source, row) -> bytes:
    """The journal's line of a film."""
    return json.dumps([source, row]).encode() + b"\n"


def write_wholly(file, content: bytes):
    """Write all bytes into an unbuffered file; a disk that fills up may take a part of them."""
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) :]


def take_up(part: Path, journal: Path, sources: list) -> list:
    """Cut what an interrupted packing left to the first films that are whole and still the same.

    A kill may have cut the last line and the last film; a power cut may have left zeros for both.
    UserError when already the first film is another one: hours of packing are not thrown away for
    a wrong --data. → the journal's rows of these films, none where nothing was begun
    """
    part.parent.mkdir(parents=True, exist_ok=True)
    lines = journal.read_bytes().splitlines() if journal.exists() else []
    rows = []
    end = len(MAGIC)
    with open(part, "ab+") as file:
        file.seek(end)
        for line, source in zip(lines, sources, strict=False):
            try:
                made_from, row = json.loads(line)
                size = row[0] * row[1]
                is_other = made_from[:2] != source[:2]
                is_whole = made_from == source and zlib.crc32(file.read(size)) == row[2]
            except (ValueError, TypeError, IndexError):
                break
            if is_other and not rows:
                raise UserError(
                    f"{part} was begun from other films or another --side: choose another --out, "
                    f"or delete it and {journal.name} to begin anew"
                )
            if not is_whole:
                break
            rows.append(row)
            end += size
        if not rows:
            file.truncate(0)
            file.write(MAGIC)
        file.truncate(end)
    if lines:
        print(f"{part}: packing resumes after {len(rows):,} of {len(lines):,} films")
    kept = zip(sources, rows, strict=False)
    replace_with(journal, lambda path: path.write_bytes(b"".join(journal_line(*k) for k in kept)))
    return rows


def append_index(part: Path, films, rows: list, states: list) -> None:
    """Append index and footer, after which the file is complete. UserError when it has no film.

    rows: of the journal, one per film; states: of the films.
    """
    packed = [i for i, row in enumerate(rows) if row[0]]
    unreadable = [i for i, row in enumerate(rows) if not row[0]]
    if not packed:
        raise UserError(
            f"none of the {len(films)} films can be read, first {films.names[0]}: {rows[0][3]}"
        )
    about = {
        "names": [films.names[i] for i in packed],
        "patients": [films.patients[i] for i in packed],
        "side": films.side,
        "folder": os.path.basename(os.path.abspath(films.root)),
        "bad": [[films.names[i], rows[i][3]] for i in unreadable],
        "states": [states[i] for i in packed + unreadable],
    }
    shapes = np.array([rows[i][:2] for i in packed], np.int32)
    stream = io.BytesIO()
    np.save(stream, shapes)
    np.save(stream, np.array([rows[i][2] for i in packed], np.uint32))
    np.save(stream, np.frombuffer(json.dumps(about).encode(), np.uint8))
    index = stream.getvalue()
    start = int(film_offsets(shapes)[-1])
    with open(part, "ab") as file:
        file.write(index)
        file.write(FOOTER.pack(start, len(index), zlib.crc32(index), MAGIC))
        file.flush()
        os.fsync(file.fileno())
