"""The run of one seed of fine-tuning on disk: config.json, log.csv, last.pt, best.pt, result.json.

config.json says with what the seed began, so that it is resumed with nothing else. last.pt holds
all that is needed to resume, best.pt the model that was best on validation, which is then tested.
"""

import dataclasses
import math
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch

from plumbing import checkpoint
from plumbing.film import EMPTY_MASK
from plumbing.folder import in_threads
from plumbing.launch import UserError, largest_divisor
from plumbing.splits import Splits, size_of
from plumbing.table import key_of
from plumbing.words import patient_of, plain


def choose_out(args) -> Path:
    """The folder that receives the results. UserError when it holds those of another program."""
    name = Path(args.labels).stem if args.labels else args.task
    out = Path("runs") / name
    if args.eval:
        films = name if args.labels else Path(args.data or args.task).name
        out = Path(args.weights).parent / f"eval-{films}"
    out = Path(args.out or out)
    checkpoint.refuse_other_program(out, checkpoint.TEST if args.eval else checkpoint.TUNING)
    return out


# Flags that do nothing where no step is trained, and where nothing is trained.
OF_STEPS = "epochs lr min_lr weight_decay layer_decay drop_path warmup clip patience max_steps "
OF_STEPS += "head batch log_every save_every compile"
OF_TRAINING = f"{OF_STEPS} freeze seed seeds fraction shots draw size image patch pool"


def refuse_useless_flags(args, kind: str | None = None):
    """UserError when a flag was given that does nothing beside the others.

    kind: that of the task, once it is known; some flags are for one kind only.
    """
    is_mask = kind == "mask"
    is_probe = kind and args.freeze and not is_mask
    uses_all = args.fraction == 1 and not args.shots
    defaults = {field.name: field.default for field in dataclasses.fields(args)}
    for holds, names, why in (
        (args.eval, OF_TRAINING, "--eval, which trains nothing"),
        (args.task != "csv", "labels column uncertain", f"--task {args.task}: it is for csv"),
        (uses_all, "draw", "all training films: give --fraction or --shots, too"),
        (is_mask, "head pool ten_crop", "segmentation"),
        (is_mask and args.freeze, "drop_path layer_decay", "a frozen encoder"),
        (is_probe, OF_STEPS, "--freeze, which solves a linear probe without steps"),
    ):
        for name in names.split():
            if holds and getattr(args, name) != defaults[name]:
                raise UserError(f"--{name} does nothing with {why}")


def choose_weights(args, out: Path) -> tuple[Path | None, str]:
    """Find the weights to start from. → (path, None for random weights; why these)"""
    if args.weights == "none":
        return None, "from scratch, as asked"
    if args.weights:
        path = Path(args.weights)
        if path.is_dir() and args.eval:
            raise UserError(
                f"--eval needs a file, such as {path}/seed0/best.pt; {path} is a folder"
            )
        if path.is_dir():
            path = path / "encoder.pt"
            if not path.is_file():
                raise UserError(f"no {path}: give the folder of a pre-training run, or a file")
        return path, "as asked"
    newest = checkpoint.newest_run(with_demo=False)
    begun = begun_in(out)
    if begun:  # a newer pre-training run must not change what this run started from
        path = checkpoint.read_json(begun[0]).get("weights") or "none"
        path = None if path == "none" else Path(path)
        why = f"as in the run in {out}"
        if newest and (path is None or newest.resolve() != path.resolve()):
            why += f", not the newest, {newest}: to start from these give another --out"
        return path, why
    if newest is None:
        demo = checkpoint.newest_run()
        raise UserError(
            "no pre-training run (encoder.pt) of real films under runs/: run pretrain.py --data "
            "FILMS, or give --weights FILE, or --weights none for scratch"
            + (f", or --weights {demo.parent} if you mean the demo" if demo else "")
        )
    return newest, "newest pre-training run under runs/"


def begun_in(out: Path) -> list[Path]:
    """The config.json of every seed that was begun in a folder."""
    return sorted(out.glob("seed*/config.json"))


def load_best(path) -> dict:
    """Load best.pt: its weights under "finetuned", what SeedRun.about says, and its path."""
    saved = checkpoint.load_checkpoint(path)
    if "finetuned" not in saved or "labels" not in saved:
        raise UserError(
            f"{path} is no fine-tuned checkpoint (best.pt of finetune.py), which --eval needs"
        )
    return {"pool": "mean"} | saved | {"path": path}  # version 0.2 had no other pool


def load_finetuned(model, saved: dict):
    """Load the weights of a best.pt into its model. saved: as load_best gives it."""
    try:
        model.load_state_dict(saved["finetuned"])
    except RuntimeError:
        raise UserError(
            f"{saved['path']} holds another network than today's, as segmentation of version 0.2.0 "
            "does: fine-tune it anew, into another --out"
        ) from None


def fit_to_model(splits: Splits, saved: dict, path) -> tuple[Splits, frozenset]:
    """Give the test films the labels of best.pt, `saved`, in its order, matched by name.

    A table of one's own is read so already; the films of a named task have the task's labels.
    Classes that it lacks are not known (None) and are named in the notes, and so are labels that
    the model does not have. UserError when they have none in common.
    → only the test films; the numbers of those whose mask nobody knows, which are predicted as if
    it were empty
    """
    kind = saved["kind"]
    classes = tuple(saved["labels"])
    notes = [*splits.notes, *warn_of_known_films(splits.test, saved)]
    if kind != "mask" and not saved.get("thresholds"):
        notes.append(f"no sensitivity: {path} is an older version's, and holds no threshold")
    test = splits.test
    if (kind, classes) != (splits.kind, splits.labels):
        place_of = {plain(name): k for k, name in enumerate(splits.labels)}
        places = [place_of.get(plain(name)) for name in classes]
        if kind != splits.kind or set(places) == {None}:
            raise UserError(
                f"{path} was trained for {', '.join(classes)} ({kind}), "
                f"the data asks for {', '.join(splits.labels)} ({splits.kind})"
            )
        absent = [name for name, place in zip(classes, places, strict=True) if place is None]
        strange = [name for k, name in enumerate(splits.labels) if k not in places]
        if absent:
            notes.append(f"not in the data, hence not judged: {', '.join(absent)}")
        if strange:
            notes.append(f"labels that the model was not trained for: {', '.join(strange)}")
        if kind != "mask":  # a film of segmentation has no labels, only its mask
            test = []
            for example in splits.test:
                truth = tuple(None if k is None else example.truth[k] for k in places)
                test.append(example._replace(truth=truth))
    unknown = frozenset(i for i, film in enumerate(test) if kind == "mask" and not film.mask)
    if unknown:
        notes.append(f"masks: those of {len(unknown)} of {len(test)} films are not known: no Dice")
    test = [film._replace(mask=EMPTY_MASK) if i in unknown else film for i, film in enumerate(test)]
    of_model = dict(kind=kind, labels=classes, notes=notes)
    return dataclasses.replace(splits, train=[], val=[], test=test, **of_model), unknown


def fingerprints(examples) -> dict[str, list]:
    """Fingerprints by which films are recognised in another folder, in the order of the examples.

    → {learnt_from: of name and size, learnt_names: of the name without folder and suffix,
    None where several films are called so, as view1_frontal.jpg; learnt_patients: of the patient,
    None where nobody knows it}
    """

    def fingerprint(text: str) -> str:
        return checkpoint.digest(text.encode(errors="surrogateescape"))[:12]

    names = [example.path.name for example in examples]
    keys = [key_of(name) for name in names]
    count = Counter(keys)
    sizes = in_threads(size_of, [example.path for example in examples])
    return {
        "learnt_from": [fingerprint(f"{n} {max(0, s)}") for n, s in zip(names, sizes, strict=True)],
        "learnt_names": [fingerprint(key) if count[key] == 1 else None for key in keys],
        "learnt_patients": [
            # However it is written: 13 of a column is 00000013 of a name.
            fingerprint((patient_of(example.patient) or example.patient).casefold())
            if example.has_patient
            else None
            for example in examples
        ],
    }


def remember(examples) -> dict[str, list[str]]:
    """What best.pt remembers of the films that it was trained or chosen on: see fingerprints.

    Sorted, so that the order tells nothing.
    """
    return {key: sorted({*found} - {None}) for key, found in fingerprints(examples).items()}


RECOGNISED = {  # in which words, by what best.pt remembers
    "learnt_from": "the model was trained or chosen on {} of these {} films; how it does on films "
    "it has seen says nothing about others",
    "learnt_patients": "{} of these {} films have the patient ids of films that the model was "
    "trained or chosen on: unless these are ids of another hospital, it has seen the patients",
    "learnt_names": "{} of these {} films have the names of films that the model was trained or "
    "chosen on, though another size: are they the same, saved again?",
}


def warn_of_known_films(examples, saved: dict) -> list[str]:
    """Warn when the model was trained or chosen on some of the films that it is tested on, or on
    others of their patients; say so when the patients cannot tell.
    """
    found = fingerprints(examples)
    is_known = {}
    for key, names in found.items():
        learnt = {*saved.get(key, ())}
        is_known[key] = [name in learnt for name in names]
    same = is_known["learnt_from"]
    pairs = zip(is_known["learnt_names"], same, strict=True)
    is_known["learnt_names"] = [named and not known for named, known in pairs]
    notes = []
    for key, words in RECOGNISED.items():
        count = sum(is_known[key])
        if count:
            notes.append("warning: " + words.format(count, len(examples)))
    whose = "of these films"
    if any(found["learnt_patients"]):
        whose = "" if saved.get("learnt_patients") else "that the model was trained on"
    if whose:
        notes.append(
            f"patients {whose} are unknown: nobody can tell by patient whether the model has seen "
            "them"
        )
    return notes


def usual_patch(defaults: dict, shape: dict) -> int:
    """The side of a patch, px: as pre-trained, or the task's finer one where it divides the image.

    Of a film of 224 px, patches of 16 px leave a map of 14 × 14: too coarse for small masks.
    """
    own = shape["patch"]
    finer = defaults.get("patch", own)
    return finer if finer < own and defaults["image"] % finer == 0 else own


def share_batch(args, films: int, processes: int) -> list[str]:
    """Set args.batch and args.micro so that every process takes the same whole micro-batches.

    → the reason why the batch is not what was wanted, if it is not
    """
    wanted = args.batch
    share = max(1, min(wanted, films) // processes)
    args.batch = share * processes
    args.micro = largest_divisor(share, args.micro or 128)
    if args.batch >= wanted:
        return []
    why = f"there are {films} films"
    if wanted <= films:
        why = f"so that {processes} processes share it; the numbers are not those of one process"
    return [f"The batch is {args.batch}, not {wanted}: {why}."]


class Steps(NamedTuple):
    """How many steps of the optimizer a seed takes."""

    per_epoch: int
    total: int  # of the whole schedule
    end: int  # where this run ends: --max_steps may cut it short
    between_validations: int


def count_steps(args, kind, films: int) -> Steps:
    """Count the steps for so many training films. An epoch has whole batches only. UserError when
    there is not a film for every process.

    Between two validations lies a fiftieth of all steps or, where that is shorter than an epoch of
    a whole set, an epoch.
    """
    if args.freeze and kind != "mask":
        return Steps(0, 0, 0, 0)  # a linear probe is computed, not trained
    per_epoch = films // args.batch
    if per_epoch == 0:  # share_batch gives every process one film at least
        raise UserError(
            f"{films} training films are fewer than the {args.batch} processes: start at most "
            f"{films} of them (torchrun --nproc_per_node)"
        )
    total = args.epochs * per_epoch
    end = min(total, args.max_steps or total)
    shortest = 1 if args.is_cut else per_epoch
    return Steps(per_epoch, total, end, between_validations=max(shortest, total // 50))


def recipe_of(settings: dict, weights: Path | None, vit, labels, films: dict) -> dict:
    """List what must stay the same when a seed is resumed.

    settings: the flags that change its numbers; the weights and the films by fingerprint. labels:
    their names. films: {"train", "val", "test"}: their examples.
    """
    weight_bytes = b""
    if weights:
        weight_bytes = b"".join(p.detach().cpu().numpy().tobytes() for p in vit.parameters())
    return settings | {
        "weights": str(weights or "none"),
        "weights_are": checkpoint.digest(weight_bytes),
        "films_and_labels": table_fingerprint(labels, films),
        "films": len(films["train"]),
    }


def table_fingerprint(labels, films: dict) -> str:
    """Fingerprint of all that a table says: names of labels; of each split the films, what is true
    of them, and which belong to one patient. Old numbers are not those of a corrected table.
    """
    patients = {}
    said = [tuple(labels)]
    for split, examples in sorted(films.items()):
        for film in examples:
            mask = film.mask and str(getattr(film.mask[1], "name", film.mask[1]))
            patient = patients.setdefault(film.patient, len(patients))
            said.append((split, film.path.name, film.truth, patient, mask))
    return checkpoint.digest(repr(said).encode())


# Why a setting may differ that nobody has changed, and how to keep it.
UNASKED = {
    "precision": "left open, it is bfloat16 where the hardware has it; give --precision {old}",
    "batch": "it is at most the number of training films, and all processes take equally many; "
    "give --batch {old}, and start a number of processes that divides {old}",
    "films_and_labels": "its table named other films, labels, patients or splits, or an earlier "
    "version read it or drew its splits otherwise",
}


def refuse_other_run(folder: Path, saved: dict, recipe: dict, is_beside: bool):
    """Raise UserError when the seed in `folder` was begun with another recipe, `saved`.

    is_beside: it is not the seed that is to be trained, but will stand in the same result.
    """
    or_else = ", or delete it to start anew"
    if is_beside:
        or_else = ", or give its settings: the seeds of one folder share a recipe and a result"
    checkpoint.refuse_other_recipe(folder, saved, recipe, or_else, UNASKED, of=folder.parent)


def begin_or_finished(folder: Path, recipe: dict, end: int, team) -> dict | None:
    """Write config.json. UserError when the folder, or that of another seed beside it, holds a run
    with another recipe: they share a result.json.

    → result.json when this seed is over, or has come to step `end`; else None
    """
    if team.lead:
        checkpoint.remove_leftovers(folder)
        for begun in begun_in(folder.parent):
            is_beside = begun.parent != folder
            refuse_other_run(begun.parent, checkpoint.read_json(begun), recipe, is_beside)
        config = folder / "config.json"
        if not config.is_file() and (folder / "last.pt").exists():
            raise UserError(
                f"{folder} holds a run without its config.json, so nobody knows its settings: "
                "choose another --out, or delete it to start anew"
            )
        checkpoint.write_json(config, recipe)
    path = folder / "result.json"
    if not path.is_file():
        return None
    result = checkpoint.read_json(path)
    return result if result["over"] or result["steps"] >= end else None


@dataclasses.dataclass
class Best:
    """The best validation so far, and how many there were since."""

    value: float | None = -1.0  # the metric, percent; None: undefined, which counts as 0
    loss: float = math.inf
    step: int = 0
    stale: int = 0  # validations without a new best

    def update(self, value: float | None, loss: float, step: int) -> bool:
        """Note a validation. → True if it is the best: a higher metric, or the same, lower loss"""
        is_best = (value or 0.0, -loss) > (self.value or 0.0, -self.loss)
        if is_best:
            self.value = value
            self.loss = loss
            self.step = step
        self.stale = 0 if is_best else self.stale + 1
        return is_best

    def __str__(self):
        value = "undefined" if self.value is None else f"{self.value:.2f}"
        return f"{value} at step {self.step}"


@dataclasses.dataclass
class SeedRun:
    """One seed in training.

    steps: Steps. about: what best.pt says beside the weights, such as the recipe.
    """

    seed: int
    folder: Path
    steps: Steps
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    about: dict
    step: int = 0  # steps done
    best: Best = dataclasses.field(default_factory=Best)

    def mean_loss(self, loss, team) -> float:
        """Average the loss of a step over the processes. UserError when it is not a number."""
        loss = team.mean(loss).item()
        if not math.isfinite(loss):
            raise UserError(
                f"seed {self.seed}: the loss became NaN or infinite at step {self.step}: "
                f"delete {self.folder}, start again with a lower --lr"
            )
        return loss

    def resume(self):
        """Resume from last.pt when there is one."""
        parts = {"finetuned": self.model, "optimizer": self.optimizer}
        saved = checkpoint.resume(self.folder / "last.pt", None, parts)
        if saved:
            self.step = saved["step"]
            self.best = Best(**saved["best"])

    def open_log(self, batch: int) -> checkpoint.Log:
        """Open log.csv where the run stands."""
        columns = ["step", "epoch", "images", "loss", "lr", "val", "val_loss", "images_per_s"]
        return checkpoint.Log(self.folder / "log.csv", columns, self.step, batch)

    def save(self):
        """Write last.pt."""
        state = {
            "finetuned": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "best": dataclasses.asdict(self.best),
        }
        checkpoint.save_atomic(state, self.folder / "last.pt")

    def save_best(self):
        """Write best.pt."""
        state = {"finetuned": self.model.state_dict(), **self.about, "step": self.step}
        checkpoint.save_atomic(state, self.folder / "best.pt")

    def save_result(self, result: dict):
        """Write result.json, and delete last.pt when there is nothing left to train."""
        checkpoint.write_json(self.folder / "result.json", result)
        if result["over"]:
            (self.folder / "last.pt").unlink(missing_ok=True)
