"""Fine-tune an encoder on one of the paper's eight benchmarks, or on your own films.

    python finetune.py --task csv --data FOLDER --labels FILE.csv            # laptop: your films, the newest pre-training run under runs/
    python finetune.py --task shenzhen --seeds 5                             # one GPU: the paper's recipe, films in $CXR/shenzhen or data/shenzhen
    torchrun --nproc_per_node=8 finetune.py --task vindr --weights FILE      # eight GPUs, the same code
    python finetune.py --task shenzhen --weights runs/shenzhen/seed0/best.pt --eval      # test a fine-tuned checkpoint again

--weights none trains from scratch, --freeze fits a head on frozen features. The model is chosen on validation, the test films are used once, at the
end. The same command again goes on where the last one stopped. --out receives seed*/{config.json,log.csv,best.pt,predictions.csv} and result.json.
"""

import contextlib
import csv
import dataclasses
import hashlib
import io
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import augment
from data import (
    Batches,
    InMemory,
    TestExamples,
    TrainExamples,
    UnreadableFilms,
    open_examples,
)
from model import SIZES, Classifier, Segmenter, ViT
from plumbing import pictures
from plumbing.benchmarks import SEGMENT, TASKS, find_root, load_task
from plumbing.checkpoint import (
    Log,
    StopRequest,
    load_checkpoint,
    save_atomic,
    write_json,
    write_text,
)
from plumbing.keys import TRAIN_JITTER, torch_generator
from plumbing.launch import (
    UserError,
    autocast,
    choose_precision,
    flag,
    parse,
    run_script,
    start_team,
    warmup_cosine,
)
from plumbing.metrics import accuracy, dice, fit_probe, mean_auroc
from plumbing.splits import class_warnings, draw_few
from plumbing.weights import load_encoder, resized


# ---------------------------------------------------------------- loss, prediction, judgement
def loss_of(kind, logits, goal):
    """Per film: labels → binary cross entropy, mean over classes; classes → cross entropy; mask → cross entropy + 1 - Dice, 1 : 1. → (B,)"""
    if kind == "classes":
        return F.cross_entropy(logits.float(), goal, reduction="none")
    bce = (
        F.binary_cross_entropy_with_logits(logits.float(), goal, reduction="none")
        .flatten(1)
        .mean(1)
    )
    if kind == "labels":
        return bce
    p, t = logits.float().sigmoid().flatten(1), goal.flatten(1)
    return bce + 1 - (2 * (p * t).sum(1) + 1e-5) / (p.sum(1) + t.sum(1) + 1e-5)


def prepare(item, kind, seed, step, places, batch, device):
    """A loaded micro-batch → images (b, 1, H, W) with brightness and contrast in 0.8 … 1.2, goal. Keyed by (seed, step, place in the batch)."""
    jitter = augment.sample_jitter(
        batch, torch_generator(TRAIN_JITTER, seed, step), 0.8 if kind == "mask" else 1.0, (0.8, 1.2)
    )[places].to(device)
    images = augment.to_float(item["view"].to(device, non_blocking=True))
    return augment.tone(images, jitter[:, 0], jitter[:, 1])[:, None], item["goal"].to(
        device, non_blocking=True
    )


@torch.no_grad()
def predict(forward, kind, films, config, team, bad, ten=False):
    """{i: row} for every readable case: what forward gives, mean over its crops (c,); kind mask: (Dice, 1 if truth has any pixel, loss)."""
    mine, rows, broken = (
        torch.utils.data.Subset(TestExamples(films, ten), range(team.rank, len(films), team.world)),
        {},
        {},
    )
    size, workers = (
        max(1, config.micro // (10 if ten else 1)),
        0 if isinstance(films, InMemory) else config.workers,
    )
    loader = torch.utils.data.DataLoader(mine, batch_size=size, num_workers=workers)
    for item in loader:
        views = augment.to_float(item["views"].to(team.device))  # (b, v, H, W)
        with autocast(team.device, config.precision):
            out = forward(views.flatten(0, 1)[:, None]).float()
        if kind == "mask":
            goal = item["goal"].to(team.device)
            losses, guess, truth = (
                loss_of(kind, out, goal).cpu(),
                (out > 0).cpu().numpy(),
                item["goal"].numpy() > 0.5,
            )
            out = [
                np.array([dice(g, t), t.any(), loss])
                for g, t, loss in zip(guess, truth, losses.tolist())
            ]
        else:
            out = out.view(*views.shape[:2], -1).mean(1).cpu().numpy()
        names, reasons = item["unreadable"], item["reason"]
        for i, name, reason, row in zip(item["index"].tolist(), names, reasons, out, strict=True):
            if name:
                broken[name] = reason
            else:
                rows[i] = row
    if team.world > 1:
        parts = [None] * team.world
        dist.all_gather_object(parts, (rows, broken))
        rows, broken = (
            {i: r for p, _ in parts for i, r in p.items()},
            {name: reason for _, b in parts for name, reason in b.items()},
        )
    for name, reason in sorted(broken.items()):
        bad.note(name, reason)
    return dict(sorted(rows.items()))


def goals(films, rows):
    """Targets (n, c) of the predicted cases, in their order."""
    return np.array([films.examples[i].target for i in rows], float)


def judge(kind, labels, films, rows):
    """→ (metric in percent, loss, {class: AUROC in percent or None}); a class without positives or negatives counts in no mean."""
    table = np.stack(list(rows.values()))
    percent = lambda x: None if np.isnan(x) else 100 * float(x)
    if kind == "mask":
        some = table[table[:, 1] > 0, 0]
        each = {
            "all films": percent(table[:, 0].mean()),
            "films with a mask": percent(some.mean() if len(some) else np.nan),
        }
        return 100 * table[:, 0].mean(), table[:, 2].mean(), each
    truth = goals(films, rows)
    mean, each = mean_auroc(table, truth)
    loss = (
        loss_of(kind, torch.tensor(table), torch.tensor(truth, dtype=torch.float32)).mean().item()
    )
    return (
        100 * (accuracy(table, truth.argmax(1)) if kind == "classes" else mean),
        loss,
        dict(zip(labels, map(percent, each))),
    )


def solve_head(model, films, config, team, bad):
    """The linear probe: logistic regression on frozen features of un-augmented films, its penalty chosen on validation, written into the head."""
    x, y = {}, {}
    model.eval()  # no drop path
    for split in ("train", "val"):
        rows = predict(model.features, "labels", films[split], config, team, bad)
        x[split], y[split] = np.stack(list(rows.values())), goals(films[split], rows)
    weight, bias = fit_probe(x["train"], y["train"], x["val"], y["val"])
    with torch.no_grad():
        model.head.weight.copy_(torch.from_numpy(weight.T))
        model.head.bias.copy_(torch.from_numpy(bias))


def write_predictions(path, kind, labels, films, rows):
    """predictions.csv: film, class, label (0/1; mask: does it have one), score (logit; mask: Dice), one row a film and class."""
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(("film", "class", "label", "score"))
    for i, row in rows.items():
        case = films.examples[i]
        pairs = (
            [(labels[0], int(row[1]), row[0])] if kind == "mask" else zip(labels, case.target, row)
        )
        table.writerows(
            (case.path.name, name, label, f"{score:.6g}") for name, label, score in pairs
        )
    write_text(path, text.getvalue())


@torch.no_grad()
def write_picture(path, model, films, rows, device):
    """cases.png: best, median and worst film by Dice, with truth in green, the prediction in red and what both hold in yellow beside it."""
    order, pictures_of, captions = sorted(rows, key=lambda i: -rows[i][0]), [], []
    for i in (order[0], order[len(order) // 2], order[-1]):
        item = TestExamples(films)[i]
        guess = (
            (model(augment.to_float(torch.from_numpy(item["views"]))[:, None].to(device)) > 0)[0]
            .cpu()
            .numpy()
        )
        tint = np.repeat(item["views"][0][..., None] * 0.6, 3, 2)
        tint[..., 0] += 100 * guess
        tint[..., 1] += 100 * item["goal"]
        pictures_of.append([item["views"][0], tint.clip(0, 255).astype(np.uint8)])
        captions.append([films.examples[i].path.name[:40], f"Dice {100 * rows[i][0]:.1f}"])
    titles = ["film", "green truth, red prediction"]
    pictures.save(
        pictures.grid(pictures_of, captions, titles, ["best", "median", "worst"], cell=256), path
    )


def layer_groups(model, weight_decay, layer_decay):
    """AdamW parameter groups {params, weight_decay, scale}: layer k of a ViT of L blocks learns at scale = layer_decay^(L + 1 - k); patch
    embedding k = 0, block i k = i + 1, final norm and head k = L + 1. Vectors (biases, norms) do not decay; frozen parameters are left out."""
    depth, groups = len(model.vit.blocks), {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        parts = name.split(".")
        layer = (
            0
            if parts[:2] == ["vit", "patch_embed"]
            else int(parts[2]) + 1
            if parts[:2] == ["vit", "blocks"]
            else depth + 1
        )
        decay = weight_decay if parameter.dim() > 1 else 0.0
        group = groups.setdefault(
            (layer, decay),
            {"params": [], "weight_decay": decay, "scale": layer_decay ** (depth + 1 - layer)},
        )
        group["params"].append(parameter)
    return list(groups.values())


METRIC = {"labels": "AUROC", "classes": "accuracy", "mask": "Dice"}


PUBLISHED = ("vindr", "chexpert")  # tasks whose epochs and batch the authors tell


MIN_STEPS = 300  # of the other tasks: few films mean more epochs


SMALL, SMALL_TUNED = (
    dict(lr=1e-3, drop_path=0.1),
    dict(lr=4e-4, drop_path=0.1),
)  # ours, for networks narrower than ViT-Small, from scratch
# and pre-trained (a new segmentation decoder needs the larger steps, too): METHOD.md's recipe is made for ViT-B


FREE = {
    "out",
    "data",
    "labels",
    "eval",
    "seed",
    "seeds",
    "device",
    "workers",
    "micro",
    "max_steps",
    "log_every",
    "save_every",
    "compile",
    "memory_gb",
}  # may change on resume


@dataclasses.dataclass
class Config:
    task: str = flag("csv", "what to learn", list(TASKS))
    data: str = flag(None, "folder of the films [$CXR/<task>, else data/<task>]")
    labels: str = flag(
        None,
        "task csv: table filename,label[,patient_id][,split]; label: a class, 'a|b' or normal; or a 0/1 column a class; or mask",
    )
    column: str = flag(
        None, "task csv: the column to learn [mask, else label, else all 0/1 columns]"
    )
    weights: str = flag(
        None,
        "encoder.pt or last.pt of a run, the authors' or timm's file, or none [the newest encoder.pt under runs/]",
    )
    out: str = flag(None, "folder of the run [runs/<task>, or runs/<name of the table>]")
    eval: bool = flag(False, "no training: test the fine-tuned checkpoint --weights")
    freeze: bool = flag(
        False, "keep the encoder as it is: linear probe (segmentation: train the decoder alone)"
    )
    head: str = flag(
        None,
        "classifier's start: random (the paper's), or probe: the linear probe, a safer start [probe for csv]",
        ["random", "probe"],
    )
    seed: int = flag(0, "first seed: of new layers, order, augmentation and draws from train")
    seeds: int = flag(
        1, "number of seeds, one after the other; the result is their mean and standard deviation"
    )
    fraction: float = flag(1.0, "share of the training films to use, drawn by seed")
    shots: int = flag(
        None, "training films of every class to use, drawn by seed, or MedFM's own lists"
    )
    size: str = flag(None, "network from scratch, with --weights none [base]", list(SIZES))
    image: int = flag(None, "side of the film the network sees, px [as pre-trained; scratch 224]")
    patch: int = flag(None, "side of a patch, px [as pre-trained; scratch 16]")
    batch: int = flag(None, "films a step over all GPUs [from the task]")
    micro: int = flag(None, "films a forward pass on one GPU [at most 128]")
    epochs: int = flag(None, "passes over the training films; sets the schedule [from the task]")
    max_steps: int = flag(None, "stop early after this many steps, without changing the schedule")
    lr: float = flag(None, "peak learning rate of the last layer [from the task]")
    min_lr: float = flag(1e-6, "learning rate at the end of the cosine")
    weight_decay: float = flag(None, "AdamW weight decay; none on biases and norms [from the task]")
    layer_decay: float = flag(
        None, "each layer's learning rate as a share of the next one's [from the task]"
    )
    drop_path: float = flag(
        None, "chance that a film skips the last block, linear over depth [from the task]"
    )
    warmup: float = flag(None, "epochs of linear warm-up [from the task, at most a tenth]")
    patience: int = flag(None, "validations without a new best before stopping [from the task]")
    clip: float = flag(1.0, "largest gradient norm")
    ten_crop: bool = flag(
        False, "classification: average the test over five crops and their mirror images"
    )
    precision: str = flag(
        "auto",
        "auto = bfloat16 on GPUs and on CPUs that multiply it natively",
        ["auto", "float32", "bfloat16"],
    )
    compile: str = flag("auto", "torch.compile; auto = on GPUs", ["auto", "on", "off"])
    device: str = flag("auto", "auto, cpu, cuda or cuda:1")
    workers: int = flag(None, "loader processes a GPU [8 on a GPU, 0 on a CPU]")
    memory_gb: float = flag(
        16.0,
        "keep the films decoded in memory when they take less than this in all processes together",
    )
    log_every: int = flag(10, "steps between rows of log.csv")
    save_every: int = flag(500, "steps between checkpoints, beside those at every validation")


# ------------------------------------------------------------------------------------------------ what was chosen, and why
def choose_weights(config, out):
    """→ (path or None for scratch, why)."""
    if config.weights == "none":
        return None, "from scratch, as asked"
    if config.weights:
        path = Path(config.weights)
        return (path / "encoder.pt" if path.is_dir() else path), "as asked"
    begun = out / f"seed{config.seed}" / "config.json"
    if begun.is_file():
        path = json.loads(begun.read_text())["weights"]
        return (None if path == "none" else Path(path)), f"as in the run in {out}"
    found = (
        sorted(Path("runs").rglob("encoder.pt"), key=os.path.getmtime)
        if Path("runs").is_dir()
        else []
    )
    if not found:
        raise UserError(
            "no pre-training run (encoder.pt) under runs/: run pretrain.py, or give --weights FILE, or --weights none for scratch"
        )
    return found[-1], "newest pre-training run under runs/"


def make_vit(config, path):
    """The encoder at the wanted image and patch size, with drop path. path None: random weights of --size."""
    if path is None:
        size = {
            k: v for k, v in SIZES[config.size or "base"].items() if not k.startswith("predictor")
        }
        return ViT(config.image, config.patch, **size, drop_path=config.drop_path)
    return resized(load_encoder(path), config.image, config.patch, config.drop_path)


def shape_of(config, path):
    """image, patch, dim, depth of the encoder before any change."""
    return (
        load_encoder(path).config
        if path
        else dict(image=224, patch=16, **SIZES[config.size or "base"])
    )


def settle(config, kind, shape, films, team):
    """A copy of config with nothing left open: the task's recipe, the encoder's shape, what few films allow. → (Config, why). films: to train on."""
    recipe = dict(SEGMENT if kind == "mask" else TASKS[config.task].recipe)
    why = "the paper's" if config.task in PUBLISHED else "the paper's; epochs and batch are ours"
    if shape["dim"] < SIZES["small"]["dim"]:
        ours = SMALL if kind == "mask" or config.weights == "none" else SMALL_TUNED
        recipe |= ours
        why = (
            f"for a small network ours: {', '.join(f'{k} {v}' for k, v in ours.items())}; else "
            + why
        )
    given = {k: v for k, v in dataclasses.asdict(config).items() if v is not None}
    settled = {**recipe, "image": shape["image"], "patch": shape["patch"], **given}
    settled["batch"] = max(1, min(settled["batch"], films) // team.world) * team.world
    share = settled["batch"] // team.world
    settled["micro"] = max(
        m for m in range(1, min(config.micro or 128, share) + 1) if share % m == 0
    )
    settled["workers"] = (
        config.workers if config.workers is not None else 8 if team.device.type == "cuda" else 0
    )
    settled["precision"] = choose_precision(config.precision, team.device)
    per_epoch = max(1, films // settled["batch"])
    if (
        config.epochs is None
        and config.task not in PUBLISHED
        and settled["epochs"] * per_epoch < MIN_STEPS
    ):
        settled["epochs"] = -(-MIN_STEPS // per_epoch)
        why += f"; epochs raised to reach {MIN_STEPS} steps"
    settled["warmup"] = min(settled["warmup"], settled["epochs"] / 10)
    return dataclasses.replace(config, **settled), why


def check(config):
    """Stop on flags that make no sense together."""
    if not 0 < config.fraction <= 1 or config.seeds < 1:
        raise UserError(
            f"--fraction {config.fraction} must be above 0 and at most 1, --seeds {config.seeds} at least 1"
        )
    if config.shots is not None and (config.shots < 1 or config.fraction < 1):
        raise UserError("--shots must be at least 1, and does not go with --fraction")
    if config.eval and (config.weights in (None, "none")):
        raise UserError("--eval needs --weights FILE, a best.pt of finetune.py")
    if config.size and config.weights != "none":
        raise UserError(
            "--size is for --weights none; otherwise the weights say how large the network is"
        )


def describe(splits):
    """Lines for the reader: the split with its counts, then what was decided on the way."""
    lines = []
    for split, c in splits.counts().items():
        positive = ", ".join(f"{name} {n}" for name, n in c.get("positive", {}).items())
        lines.append(
            f"{split}: {c['films']} films of {c['patients']} patients"
            + (f" ({positive})" if positive else "")
        )
    return [*lines, *splits.notes, *class_warnings(splits)]


def judgeable(splits):
    """Stop before training when the test split cannot give a number."""
    films = len(splits.test)
    if splits.kind != "mask" and not any(
        0 < sum(c.target[k] for c in splits.test) < films for k in range(len(splits.labels))
    ):
        raise UserError(
            f"no class has positive and negative films among the {films} test films: AUROC is undefined; choose another split"
        )


def recipe_line(config, kind, n, total, every, reason):
    """What will be trained and why so, in one line."""
    if config.freeze and kind != "mask":
        return f"linear probe on {n} films, encoder frozen, {config.image} px in {config.patch} px patches, penalty chosen on validation"
    return (
        f"{n} films, {config.image} px in {config.patch} px patches{', encoder frozen' if config.freeze else ''}, "
        f"{config.epochs} epochs = {total} steps of {config.batch}, {config.head} head, lr {config.lr:g}, weight decay {config.weight_decay:g}, "
        f"layer decay {config.layer_decay:g}, drop path {config.drop_path:g}, {config.precision}; validation every {every} steps, "
        f"stop after {config.patience} without a new best ({reason})"
    )


# ------------------------------------------------------------------------------------------------ result
def summarise(out, config, splits, weights, results, team):
    """result.json over the seeds trained so far, and the last lines on the screen."""
    values, kind = [r["value"] for r in results], METRIC[splits.kind]
    per_class = {name: [r["per_class"][name] for r in results] for name in results[0]["per_class"]}
    per_class = {name: None if None in v else float(np.mean(v)) for name, v in per_class.items()}
    std = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    result = {
        "task": config.task,
        "metric": kind,
        "mean": float(np.mean(values)),
        "std": std,
        "seeds": values,
        "per_class": per_class,
        "split": splits.counts(),
        "notes": splits.notes,
        "weights": str(weights or "none"),
        "freeze": config.freeze,
        "fraction": config.fraction,
        "shots": config.shots,
        "trained_on": [r["films"] for r in results],
        "bad": sorted({name for r in results for name in r["bad"]}),
    }
    if team.lead:
        write_json(out / "result.json", result)
    for name, value in per_class.items():
        team.say(
            f"  {name:32s} {'undefined: test lacks its positives or negatives' if value is None else f'{value:6.2f}'}"
        )
    paper = TASKS[config.task].paper
    team.say(
        f"test {kind} {result['mean']:.2f} ± {std:.2f} % over {len(values)} seed(s){f' (paper {paper})' if paper else ''}: {out}/result.json"
    )


# ------------------------------------------------------------------------------------------------ runs that go on where they stopped
def recipe_of(config, path, vit, drawn):
    """What a run must keep to be continued: every setting that changes the numbers, the weights and the training films by fingerprint."""
    digest = lambda data: hashlib.sha256(data).hexdigest()[:16]
    films = repr([(str(c.path.name), c.target, c.mask and c.mask[0]) for c in drawn]).encode()
    weights = (
        b"".join(p.detach().cpu().numpy().tobytes() for p in vit.parameters()) if path else b""
    )
    recipe = {k: v for k, v in dataclasses.asdict(config).items() if k not in FREE}
    return recipe | {
        "weights": str(path or "none"),
        "weights_are": digest(weights),
        "films_are": digest(films),
        "films": len(drawn),
    }


def same_recipe(folder, recipe):
    """Keep the recipe in config.json; Stop when the folder holds a run with another one."""
    path = folder / "config.json"
    if path.is_file():
        old = json.loads(path.read_text())
        changed = [f"{k} {old.get(k)} → {v}" for k, v in recipe.items() if old.get(k) != v]
        if changed:
            raise UserError(
                f"{folder} holds a run with another recipe ({'; '.join(changed)}): choose another --out, or delete it to start anew"
            )
    write_json(path, recipe)


def finished(path, end):
    """result.json of a seed that has nothing left to train, else None."""
    result = json.loads(path.read_text()) if path.is_file() else None
    return result if result and (result["over"] or result["steps"] >= end) else None


def resume(path, model, optimizer, best):
    """Continue from last.pt when there is one. → step to go on with, best so far on validation"""
    if not path.is_file():
        return 0, best
    saved = load_checkpoint(path)
    model.load_state_dict(saved["finetuned"])
    optimizer.load_state_dict(saved["optimizer"])
    return saved["step"], saved["best"]


def judged(best, value, loss, step):
    """The record of the best validation so far: a higher metric, or the same and a lower loss; stale counts the validations since."""
    value = float(np.nan_to_num(value))
    if (value, -loss) > (best["value"], -best["loss"]):
        return {"value": value, "loss": float(loss), "step": step, "stale": 0}
    return {**best, "stale": best["stale"] + 1}


def load_finetuned(path, device, kind, labels):
    """best.pt → the model in evaluation mode; Stop when it was trained for something else."""
    saved = load_checkpoint(path)
    if "finetuned" not in saved or "labels" not in saved:
        raise UserError(
            f"{path} is no fine-tuned checkpoint (best.pt of finetune.py), which --eval needs"
        )
    if (saved["kind"], tuple(saved["labels"])) != (kind, tuple(labels)):
        raise UserError(
            f"{path} was trained for {', '.join(saved['labels'])} ({saved['kind']}), the data asks for {', '.join(labels)} ({kind})"
        )
    vit = ViT(**saved["config"])
    model = Segmenter(vit) if kind == "mask" else Classifier(vit, len(labels))
    model.load_state_dict(saved["finetuned"])
    return model.to(device).eval()


def main():
    # config
    asked = parse(Config, __doc__)
    check(asked)
    name = Path(asked.labels).stem if asked.labels else asked.task
    out = Path(
        asked.out or (Path(asked.weights).parent / "eval" if asked.eval else Path("runs") / name)
    )

    # devices
    team = start_team(asked.device)
    device, preempted = team.device, StopRequest()

    # data
    path, why = choose_weights(asked, out)
    root = find_root(asked.task, asked.data)
    splits = load_task(
        asked.task,
        root,
        asked.labels,
        asked.shots,
        asked.column,
        out / "films.json" if team.lead else None,
    )
    kind, labels, metric = splits.kind, splits.labels, METRIC[splits.kind]
    ready = load_finetuned(path, device, kind, labels) if asked.eval else None
    shape = ready.vit.config if ready else shape_of(asked, path)
    came = f", pre-trained at {shape['image']} px in {shape['patch']} px patches" if path else ""
    team.say(f"weights: {path or 'none'} ({why}): ViT {shape['dim']} × {shape['depth']}{came}")
    team.say(
        "\n  ".join(
            [f"data: {root}, task {asked.task}: {metric} of {', '.join(labels)}", *describe(splits)]
        )
    )
    judgeable(splits)
    size, bad = (
        shape["image"] if ready else asked.image or shape["image"],
        UnreadableFilms(sum(c["films"] for c in splits.counts().values())),
    )
    fits = bad.total * (2 * size) ** 2 * 1.2 * team.world < asked.memory_gb * 1e9
    films = {split: open_examples(getattr(splits, split), size, fits) for split in ("val", "test")}

    results, stopping = [], False
    for seed in range(asked.seed, asked.seed + asked.seeds):
        drawn = (
            splits.train
            if splits.drawn
            else draw_few(splits.train, asked.fraction, asked.shots, seed)
        )
        if len(drawn) < len(splits.train):
            lines = class_warnings(dataclasses.replace(splits, train=drawn), ["train"])
            team.say(
                "\n  ".join(
                    [
                        f"seed {seed}: {len(drawn)} of the {len(splits.train)} training films drawn",
                        *lines,
                    ]
                )
            )
        training = [] if ready else drawn
        if "train" not in films or films["train"].examples != training:
            films["train"] = open_examples(training, size, fits)
        config, reason = settle(asked, kind, shape, len(drawn), team)
        n, per_epoch = len(drawn), len(drawn) // config.batch
        total = config.epochs * per_epoch
        end, every = (
            min(total, config.max_steps or total),
            max(per_epoch, total // 50),
        )  # every: steps between validations
        if not results:
            team.say(
                "recipe: none, test only"
                if ready
                else f"recipe: {recipe_line(config, kind, n, total, every, reason)}"
            )
        folder = out if ready else out / f"seed{seed}"

        # model
        torch.manual_seed(seed)
        vit = ready.vit if ready else make_vit(config, path)
        model = ready or (Segmenter(vit) if kind == "mask" else Classifier(vit, len(labels))).to(
            device
        )
        model.vit.requires_grad_(not config.freeze)
        recipe = recipe_of(config, path, vit, drawn)
        if team.lead and not ready:
            same_recipe(folder, recipe)
        if not ready and (past := finished(folder / "result.json", end)):
            team.say(f"seed {seed}: finished before, test {metric} {past['value']:.2f} %")
            results.append(past)
            continue
        about = {
            "config": vit.config,
            "task": config.task,
            "kind": kind,
            "labels": list(labels),
            "recipe": recipe,
        }
        best = {"value": -1.0, "loss": float("inf"), "step": 0, "stale": 0}
        solved = config.freeze and kind != "mask"  # a linear probe has one optimum: no loop
        probing = solved or config.head == "probe" and kind != "mask"
        if probing and not ready and not (folder / "last.pt").is_file():
            solve_head(model, films, config, team, bad)
            best = judged(
                best,
                *judge(
                    kind,
                    labels,
                    films["val"],
                    predict(model.eval(), kind, films["val"], config, team, bad),
                )[:2],
                0,
            )
            if team.lead:
                save_atomic(
                    {"finetuned": model.state_dict(), **about, "step": 0}, folder / "best.pt"
                )

        # optimizer
        groups = layer_groups(model, config.weight_decay, config.layer_decay)
        optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.999), fused=True)

        # resume
        start, best = resume(folder / "last.pt", model, optimizer, best)
        tired, done = best["stale"] >= config.patience, start
        end = start if ready or solved or tired else end
        if start:
            team.say(f"seed {seed}: going on at step {start} of {total}")
        if team.lead and start < end:
            log = Log(
                folder / "log.csv",
                ["step", "epoch", "images", "loss", "lr", "val", "val_loss", "images_per_s"],
                start,
            )

        # compile, DDP
        compiling = config.compile == "on" or config.compile == "auto" and device.type == "cuda"
        forward = torch.compile(model) if compiling else model
        if team.world > 1 and start < end:
            forward = DistributedDataParallel(
                forward, device_ids=[device] if device.type == "cuda" else None
            )

        # loop
        share, accumulate = config.batch // team.world, config.batch // team.world // config.micro
        batches = Batches(n, config.batch, config.micro, team.rank, team.world, seed, start, end)
        views = TrainExamples(films["train"], seed)
        loader = iter(
            DataLoader(
                views,
                batch_sampler=batches,
                num_workers=config.workers,
                pin_memory=device.type == "cuda",
            )
        )
        bar = tqdm(
            total=end,
            initial=start,
            desc=f"seed {seed}",
            unit="step",
            disable=not team.lead or start == end,
        )
        since, logged = time.perf_counter(), start
        for step in range(start, end):
            model.train()
            model.vit.train(not config.freeze)
            torch.manual_seed(
                int(np.random.SeedSequence((8, seed, step, team.rank)).generate_state(1)[0])
            )  # drop path, the same after a resume
            lr = warmup_cosine(
                step, total, round(config.warmup * per_epoch), config.lr, config.min_lr
            )
            for group in optimizer.param_groups:
                group["lr"] = lr * group["scale"]
            losses = []
            for part in range(accumulate):
                item = next(loader)
                bad.note_batch(item)
                places = team.rank * share + part * config.micro + torch.arange(config.micro)
                images, goal = prepare(item, kind, seed, step, places, config.batch, device)
                sync = (
                    forward.no_sync()
                    if team.world > 1 and part + 1 < accumulate
                    else contextlib.nullcontext()
                )
                with sync, autocast(device, config.precision):
                    loss = loss_of(kind, forward(images), goal).mean() / accumulate
                    loss.backward()
                losses.append(loss.detach())
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            bar.update()

            done, value, val_loss = step + 1, "", ""
            stopping = team.any(preempted.requested)
            validating = done % every == 0 or done == end
            logging = validating or done % config.log_every == 0
            if logging:
                mean = team.mean(torch.stack(losses).sum()).item()
                if not np.isfinite(mean):
                    raise UserError(
                        f"seed {seed}: the loss became NaN or infinite at step {done}: delete {folder}, start again with a lower --lr"
                    )
            if validating:
                value, val_loss, _ = judge(
                    kind,
                    labels,
                    films["val"],
                    predict(model.eval(), kind, films["val"], config, team, bad),
                )
                best = judged(best, value, val_loss, done)
                tired = best["stale"] >= config.patience
                bar.set_postfix_str(
                    f"val {metric} {value:.2f}, best {best['value']:.2f} at step {best['step']}"
                )
                if team.lead and best["step"] == done:
                    save_atomic(
                        {"finetuned": model.state_dict(), **about, "step": done}, folder / "best.pt"
                    )
            if team.lead and logging:
                rate, since, logged = (
                    (done - logged) * config.batch / (time.perf_counter() - since),
                    time.perf_counter(),
                    done,
                )
                log.row(
                    step=done,
                    epoch=done / per_epoch,
                    images=done * config.batch,
                    loss=mean,
                    lr=lr,
                    val=value,
                    val_loss=val_loss,
                    images_per_s=rate,
                )
            if team.lead and (validating or stopping or done % config.save_every == 0):
                state = {
                    "finetuned": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": done,
                    "best": best,
                }
                save_atomic(state, folder / "last.pt")
            if stopping or tired:
                break
        bar.close()
        if stopping:
            team.say(
                f"SIGTERM: saved at step {done} in {folder}; the same command goes on from there"
            )
            break

        # test, once
        team.wait()  # the others wait for best.pt
        model = ready or load_finetuned(folder / "best.pt", device, kind, labels)
        rows = predict(model, kind, films["test"], config, team, bad, config.ten_crop)
        value, _, per_class = judge(kind, labels, films["test"], rows)
        over = bool(ready or solved or tired or done >= total)
        results.append(
            {
                "value": value,
                "per_class": per_class,
                "films": n,
                "val": best["value"],
                "best_step": best["step"],
                "steps": done,
                "over": over,
                "bad": sorted(bad.reasons),
            }
        )
        if team.lead:
            write_predictions(folder / "predictions.csv", kind, labels, films["test"], rows)
            if kind == "mask":
                write_picture(folder / "cases.png", model, films["test"], rows, device)
            if not ready:
                write_json(folder / "result.json", results[-1])
            if over:
                (folder / "last.pt").unlink(missing_ok=True)
        if not ready:
            team.say(
                f"seed {seed}: test {metric} {value:.2f} %, of the model at step {best['step']}, the best on validation ({best['value']:.2f} %)"
            )

    if results and not stopping:
        summarise(out, asked, splits, path, results, team)
    team.leave()


if __name__ == "__main__":
    run_script(main)
