"""What a frozen world model or encoder knows, measured the same way wherever a script asks: the domain sensitivity test and the linear probe.

Shared by pretrain.py (its closing table) and analyze.py.
"""

import csv
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import augment
from data import BadFilm, match
from metrics import linear_probe, mean_auroc, recall_at_k
from runtime import Stop, keyed

NEGATIVE = {"", "normal", "no finding", "none", "negative", "0"}
SPLITS = ("train", "val", "test")


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


@torch.no_grad()
def domain_errors(world, image, actions, candidates):
    """Eq. (13) for one film: error of the prediction from x_i = T_{a_i}(y_i) against every candidate y_j, all patches. image (1, 1, H, W) → two (n, n):
    told the action, told the identity."""
    device = next(world.parameters()).device
    image, actions, candidates = (v.to(device) for v in (image, actions, candidates))
    y = augment.tone(image.expand(len(candidates), -1, -1, -1), candidates[:, 0], candidates[:, 1])
    h, truth, at = (
        world.encoder(augment.apply_action(y, actions)),
        world.targets(y).flatten(1),
        world.coords.expand(len(actions), -1, -1),
    )
    identity = torch.tensor(augment.IDENTITY, device=device).expand(len(actions), 4)
    return [
        torch.cdist(world.predictor(h, at, at, told).float().flatten(1), truth)
        for told in (actions, identity)
    ]


def domain_test(world, images, seed=0, side=8, progress=False):
    """Domain sensitivity test (Table 4): 64 candidates evenly over the range, Recall@1/3/5 in percent with the action, without it, and of chance.

    images (n, 1, H, W). "Without" = the same model told the identity action. → the dict that analyze domain writes.
    """
    candidates, recalls = augment.domain_candidates(side), {"action": [], "no_action": []}
    for k, image in enumerate(tqdm(images, desc="domain test", disable=not progress, leave=False)):
        actions = augment.sample_actions(len(candidates), keyed(seed, k))
        for each, errors in zip(
            recalls.values(), domain_errors(world, image[None], actions, candidates)
        ):
            each.append(recall_at_k(errors))
    result = {
        name: {f"recall@{k}": 100 * float(np.mean([r[k] for r in each])) for k in (1, 3, 5)}
        for name, each in recalls.items()
    }
    chance = {f"recall@{k}": 100 * k / len(candidates) for k in (1, 3, 5)}
    return result | {"random": chance, "images": len(images), "candidates": len(candidates)}


class Labels:
    """A CSV `filename,label[,patient_id][,split]`: label is one class or several joined by | ("normal" = none of them).

    names, y (n, classes) 0/1, classes, split (n,) of train/val/test, patients.
    """

    def __init__(self, path):
        self.path = Path(path)
        if not self.path.is_file():
            raise Stop(
                f"--probe {path}: no such file; a CSV with the columns filename,label,split is wanted"
            )
        with open(self.path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
        if not rows or not {"filename", "label", "split"} <= rows[0].keys():
            raise Stop(
                f"--probe {path}: the columns filename, label and split are wanted, found {', '.join(rows[0]) if rows else 'nothing'}"
            )
        for line, r in enumerate(rows, 2):
            if (
                not r["filename"]
                or r["label"] is None
                or (r["split"] or "").strip().lower() not in SPLITS
            ):
                raise Stop(
                    f"--probe {path}, line {line}: a filename, a label and a split of {', '.join(SPLITS)} are wanted, found {','.join(map(str, r.values()))[:120]}"
                )
        self.names = [r["filename"].strip() for r in rows]
        parts = [{p.strip() for p in r["label"].split("|")} for r in rows]
        self.classes = sorted({p for each in parts for p in each if p.lower() not in NEGATIVE})
        self.y = np.array([[c in each for c in self.classes] for each in parts], dtype=float)
        self.split = np.array([r["split"].strip().lower() for r in rows])
        self.patients = [r.get("patient_id") or r["filename"] for r in rows]

    def complete(self):
        """Itself, when a probe can be fitted, chosen and tested on it; else Stop."""
        if not self.classes or set(SPLITS) - set(self.split):
            raise Stop(
                f"--probe {self.path}: films of all three splits ({', '.join(SPLITS)}) and a class beside normal are wanted; "
                f"found {', '.join(sorted(set(self.split)))}; {', '.join(self.classes) or 'no class'}"
            )
        return self

    def locate(self, films):
        """Row → number of its film in `films` by path tail, -1 where it is missing; Stop when none is there, or when a row fits two."""
        where = {}
        for i, name in enumerate(match(films.names, self.names)):
            if name is None:
                continue
            if name in where:  # CheXpert calls every film view1_frontal.jpg
                raise Stop(
                    f"--probe {self.path}: {name} fits both {films.names[where[name]]} and {films.names[i]}: write more of the path"
                )
            where[name] = i
        found = np.array([where.get(name, -1) for name in self.names])
        if (found < 0).all():
            raise Stop(
                f"--probe {self.path}: none of its {len(found)} films is in the data (first: {self.names[0]})"
            )
        return found


def readable(films, indices):
    """Those of `indices` whose film can be read."""
    good = []
    for i in indices:
        try:
            films[int(i)]
            good.append(int(i))
        except BadFilm:
            pass
    return np.array(good, dtype=int)


def probe_table(labels, films, encoders, size):
    """Linear-probe AUROC (percent, mean over classes) on the test split for each {name: ViT}, and of raw 64 × 64 pixels. → {name: AUROC}"""
    where = labels.locate(films)
    keep = np.isin(where, readable(films, where[where >= 0]))
    where, y, split = where[keep], labels.y[keep], labels.split[keep]
    fit, val, test = (split == "train", split == "val", split == "test")
    images = whole(films, where, size)
    features = {name: pooled(encoder, images).numpy() for name, encoder in encoders.items()}
    features["raw 64² pixels"] = whole(films, where, 64).flatten(1).numpy()
    score = lambda x: mean_auroc(linear_probe(x[fit], y[fit], x[val], y[val], x[test]), y[test])[0]
    return {name: 100 * score(x) for name, x in features.items()}
