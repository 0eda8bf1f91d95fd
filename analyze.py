"""See and measure what a world model knows.

    python analyze.py domain                                              # Table 4: does it use the action? Newest run, synthetic films
    python analyze.py domain --weights runs/pretrain/last.pt --data FILMS
    python analyze.py correspondence --data FILMS --table lungs.csv       # Fig. 6: landmarks found by their features, in % of the width
    python analyze.py health --weights encoder.pt --data FILMS            # collapsed? spectrum, RankMe, probe against random weights
    python analyze.py surprise --data ARCHIVE --reference GOOD_FILMS      # which films does it not believe? p-values, heat maps
    python analyze.py views --data FILMS --image 224 --patch 16           # crops, masks, augmented contexts, as a picture
    python analyze.py ablation --seeds 3                                  # Table 3 in miniature; goes on where it stopped
    python analyze.py gallery --weights runs/phantoms                     # all of these and rcdm.py on synthetic films, pictures into docs/

Without --data the films are synthetic, of patients that no demo was trained on. Each command writes result.json and its pictures
into --out. domain and surprise need a predictor: a run's last.pt or the authors' file. python analyze.py COMMAND --help lists the flags.
"""

import dataclasses
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

import ablation
import augment
import evaluate
import landmarks
import pictures
import runtime
import surprise
from masks import sample_masks
from metrics import feature_std, rankme, spectrum
from model import ViT, load_checkpoint, load_encoder, load_world
from runtime import Stop, flag, keyed
from subject import Common, evenly, find_weights, finish, grey, named, open_set, some_films

GREEN = "#37d67a"


@dataclasses.dataclass
class Correspondence(Common):
    table: str = flag(
        None,
        "CSV with filename and NAME_row, NAME_col (px), or filename and mask (both lungs: tips and lower corners are derived)",
    )
    references: int = flag(
        5, "films in which the landmarks are marked; each is used alone, results are averaged"
    )
    image: int = flag(
        None, "side of the films, px; other sizes than the encoder's are allowed [the encoder's]"
    )
    patch: int = flag(None, "side of a patch, px [the encoder's]")
    side: int = flag(64, "side of the heat maps, px")
    crop: bool = flag(
        False,
        "cut the films at random, all landmarks inside: the closer these lie together, the less their places alone tell",
    )


@dataclasses.dataclass
class Health(Common):
    films: int = flag(400, "films to look at, evenly from all")
    table: str = flag(
        None, "CSV filename,label,split: a linear probe against random weights and raw pixels"
    )


@dataclasses.dataclass
class Views(Common):
    films: int = flag(4, "films to show")
    image: int = flag(None, "side of the crops, px [128]")
    patch: int = flag(None, "side of a patch, px [16]")


# ------------------------------------------------------------------------------------------------ domain
def domain(config, device):
    """Domain sensitivity test (Table 4) on held-out films, the error matrices of one film, and what the model chose."""
    world = load_world(find_weights(config)).to(device).eval()
    films, table = open_set(config, 7 * config.films)
    images = some_films(films, table, config.films, world.encoder.image)
    result = evaluate.domain_test(world, images, config.seed, progress=True)
    lines = [
        f"domain sensitivity test, {len(images)} films × {result['candidates']} candidates (Table 4), percent"
    ]
    for key, words in (
        ("action", "with the action"),
        ("no_action", "without"),
        ("random", "chance"),
    ):
        lines.append(
            f"  {words:18s}"
            + "".join(f"  Recall@{k} {result[key][f'recall@{k}']:6.2f}" for k in (1, 3, 5))
        )
    candidates = augment.domain_candidates()
    actions = augment.sample_actions(
        len(candidates), keyed(config.seed, 0)
    )  # those of film 0 in domain_test
    matrices = [
        errors.cpu().numpy()
        for errors in evaluate.domain_errors(world, images[:1], actions, candidates)
    ]
    finish(
        config,
        result,
        "\n".join(lines),
        choices=choices_picture(images[0], actions, candidates, *matrices),
        errors=errors_picture(*matrices),
    )


def errors_picture(told, untold):
    """Both error matrices, each row from its smallest (dark) to its largest (bright) error: a dark diagonal is what one hopes for."""
    scaled = [
        (e - e.min(1, keepdims=True)) / np.ptp(e, axis=1, keepdims=True).clip(1e-12)
        for e in (told, untold)
    ]
    captions = [["row: prediction i, column: candidate j", "dark = small error"]]
    return pictures.grid(
        [[pictures.heat(e, 0, 1) for e in scaled]],
        captions,
        ["told the action", "not told"],
        cell=5 * len(told),
    )


def choices_picture(image, actions, candidates, told, untold, shown=5):
    """Three contexts of one film (best, middle, worst rank of the truth), each with its truth and the candidates closest to the prediction."""
    rank = lambda errors: (errors < np.diag(errors)[:, None]).sum(1) + 1
    ranks, ranks_untold, rows, captions = rank(told), rank(untold), [], []
    y = augment.tone(image.expand(len(candidates), -1, -1, -1), candidates[:, 0], candidates[:, 1])
    x = augment.apply_action(y, actions)
    order = np.argsort(ranks, kind="stable")
    for i in order[[0, len(order) // 2, -1]]:
        best = np.argsort(told[i], kind="stable")[:shown]
        side = image.shape[-1]
        outlined = [
            pictures.draw_boxes(grey(y[j]), [(0, 0, side, side)], [GREEN]) if j == i else grey(y[j])
            for j in best
        ]
        rows.append([grey(x[i]), grey(y[i]), *outlined])
        b, c, g, s = actions[i].tolist()
        captions.append(
            [
                f"b {b:.2f} c {c:.2f} g {g:.2f} blur {s:.1f}",
                f"rank {ranks[i]}, untold {ranks_untold[i]}",
                *(f"{told[i, j]:.2f}" for j in best),
            ]
        )
    titles = ["context x", "its truth y", *(f"choice {k + 1}" for k in range(shown))]
    return pictures.grid(rows, captions, titles, cell=150)


# ------------------------------------------------------------------------------------------------ correspondence
def correspondence(config, device):
    """Landmarks of reference films found in others by nearest features (Fig. 6), against random weights, raw pixels and places alone."""
    encoder = load_encoder(find_weights(config))
    films, table = open_set(
        config, 7 * (config.films + config.references), side=0
    )  # as stored: the table counts its pixels
    if not table:
        raise Stop(
            "correspondence on --data needs --table CSV with landmarks (NAME_row, NAME_col) or lung masks (mask)"
        )
    numbers, places, shapes, names = landmarks.read_landmarks(
        table, films, config.films + config.references
    )
    size, patch, R = (
        config.image or encoder.image,
        config.patch or encoder.patch,
        min(config.references, len(numbers) - 1),
    )
    if size % patch:
        raise Stop(f"--image {size} is not a multiple of --patch {patch}")
    rng, boxes = np.random.default_rng((10, config.seed)), [(0.0, 0.0, *shape) for shape in shapes]
    if config.crop:
        boxes[R:] = [
            landmarks.box_around(rng, shape, place) for shape, place in zip(shapes[R:], places[R:])
        ]
    boxes = np.array(boxes)
    kept = float((boxes[R:, 2:].prod(1) / shapes[R:].prod(1)).mean())
    places, shapes = (
        (places * shapes[:, None] - boxes[:, None, :2]) / boxes[:, None, 2:],
        boxes[:, 2:],
    )
    images = augment.to_float(
        torch.from_numpy(
            np.stack([augment.crop(films[int(i)], box, size) for i, box in zip(numbers, boxes)])
        )
    )[:, None]
    torch.manual_seed(config.seed)
    fresh = ViT(**encoder.config)
    pair = {
        name: vit.resized(size, patch).to(device).eval()
        for name, vit in (("pre-trained", encoder), ("random weights", fresh))
    }
    ways = {
        name: lambda x, vit=vit: landmarks.dense(vit, x, config.side) for name, vit in pair.items()
    }
    ways["raw pixels"] = lambda x: landmarks.raw_windows(x, config.side, size // patch)
    found = {
        name: landmarks.find(way, images[:R], places[:R], images[R:], name)
        for name, way in ways.items()
    }  # (R, n, L, 2) each
    found["reference's place"] = np.broadcast_to(places[:R, None], found["raw pixels"].shape)
    others = (places.sum(0) - places[R:]) / (
        len(places) - 1
    )  # mean over all films but the one asked about
    found["mean place of all other films"] = others[None]
    result = {name: landmarks.score(f, places[R:], shapes[R:]) for name, f in found.items()}
    lines = [
        f"correspondence, {R} reference × {len(images) - R} films{f' cut at random to {kept:.0%} of their area' * config.crop}, {size}² px in {patch}² patches; distance in % of the width, PCK in %",
        f"  {'':30s}distance  PCK@5  PCK@10   " + "  ".join(names),
    ]
    for name, row in result.items():
        each = "  ".join(f"{v:{len(n)}.1f}" for v, n in zip(row["distance_each"], names))
        lines.append(
            f"  {name:30s}{row['distance']:8.1f}{row['pck@5']:7.1f}{row['pck@10']:8.1f}   {each}"
        )
    shown = [0, *range(R, min(R + 5, len(images)))]
    page = maps_picture(ways["pre-trained"], images[shown], places[shown], names)
    result = {
        "methods": result,
        "references": R,
        "films": len(images) - R,
        "landmarks": names,
        "image": size,
        "patch": patch,
        "area_kept": kept,
    }
    finish(config, result, "\n".join(lines), maps=page)


def maps_picture(way, images, places, names, cell=150):
    """One row a landmark: the reference film, then test films under their heat map (bright = alike); cross = truth, ring = answer."""
    features = way(images)
    maps = landmarks.heat_maps(features[0], places[0], features[1:])  # (B, L, side, side)
    answers, rows = landmarks.nearest(maps), []
    films = [pictures.to_picture(grey(image), cell) for image in images]
    for k in range(len(names)):
        row = [mark(films[0], places[0, k], None)]
        for film, each, true, answer in zip(
            films[1:], maps[:, k].cpu().numpy(), places[1:, k], answers[:, k]
        ):
            row.append(mark(pictures.overlay(film, pictures.heat(-each), 0.45), true, answer))
        rows.append(row)
    titles = ["reference", *(f"film {i + 1}" for i in range(len(images) - 1))]
    return pictures.grid(
        rows, column_titles=titles, row_titles=[n.replace("_", " ") for n in names], cell=cell
    )


def mark(picture, true, answer, size=6):
    """A cross at the true place and a ring at the answer; places are fractions (row, col)."""
    picture = picture.copy()
    draw, (width, height) = ImageDraw.Draw(picture), picture.size
    row, col = true[0] * height, true[1] * width
    for line in ([col - size, row, col + size, row], [col, row - size, col, row + size]):
        draw.line(line, GREEN, 2)
    if answer is not None:
        row, col = answer[0] * height, answer[1] * width
        draw.ellipse([col - size, row - size, col + size, row + size], outline="white", width=2)
    return picture


# ------------------------------------------------------------------------------------------------ health
def health(config, device):
    """Is the encoder collapsed? Variety of its pooled features against the same network with random weights; a linear probe where labels are known."""
    path = find_weights(config)
    encoder = load_encoder(path)
    torch.manual_seed(config.seed)
    encoders = {"target encoder": encoder, "random weights": ViT(**encoder.config)}
    if "world" in load_checkpoint(path):
        encoders["context encoder"] = load_encoder(path, "context")
    broken = [
        name
        for name, vit in encoders.items()
        if not all(torch.isfinite(p).all() for p in vit.parameters())
    ]
    if broken:
        raise Stop(
            f"{path}: the {broken[0]} holds NaN or infinite weights: go back to an older checkpoint, lower --lr or train in float32"
        )
    encoders = {name: vit.to(device).eval() for name, vit in encoders.items()}
    films, table = open_set(config, 3 * config.films)
    images = some_films(films, None, config.films, encoder.image)
    features = {name: evaluate.pooled(vit, images).numpy() for name, vit in encoders.items()}
    result = {"films": len(images), **{name: variety(f) for name, f in features.items()}}
    lines = [
        f"{len(images)} films, pooled features of {encoder.dim} dimensions",
        f"  {'':18s}{'std':>8s}{'RankMe':>8s}{'mean cosine':>13s}{'first direction':>17s}",
    ]
    for name in encoders:
        row = result[name]
        lines.append(
            f"  {name:18s}{row['feature_std']:8.3f}{row['rankme']:8.2f}{row['mean_cosine']:13.3f}{row['first_direction']:16.1%}"
        )
    if table:
        labels = evaluate.Labels(table).complete()
        result["probe"] = evaluate.probe_table(labels, films, encoders, encoder.image)
        lines += [f"linear probe on {labels.path.stem}, test AUROC, percent"] + [
            f"  {n:18s}{v:8.2f}" for n, v in result["probe"].items()
        ]
    result["verdict"] = verdict(
        result["target encoder"], result["random weights"], result.get("probe")
    )
    lines += ["verdict: " + result["verdict"]]
    values = {
        name: (v := spectrum(f - f.mean(0)))[v > 1e-6] for name, f in features.items()
    }  # centring takes one direction away
    pages = [
        pictures.curves(
            {name: (np.arange(1, 1 + len(v)), v) for name, v in values.items()},
            "Singular values of the centred features",
            "direction",
            "share",
            log_y=True,
        )
    ]
    rows = [
        r for r in runtime.read_log(path.with_name("log.csv")) if r.get("loss") and r.get("rankme")
    ]
    if len(rows) > 1:
        read = lambda key: ([float(r["step"]) for r in rows], [float(r[key]) for r in rows])
        for key, name, unit in (
            ("loss", "Loss", "squared error"),
            ("rankme", "RankMe", "effective rank"),
        ):
            pages.append(pictures.curves({name: read(key)}, f"{name} in training", "step", unit))
    finish(config, result, "\n".join(lines), health=pictures.stack(pages))


def variety(features):
    """How different the films look to an encoder: std, RankMe, mean cosine between two films, share of the first centred direction. (n, D) → dict"""
    unit = features / np.linalg.norm(features, axis=1, keepdims=True).clip(1e-12)
    n = len(unit)
    cosine = (np.square(unit.sum(0)).sum() - n) / max(
        1, n * (n - 1)
    )  # mean over all pairs of different films
    return {
        "feature_std": feature_std(features),
        "rankme": rankme(features),
        "mean_cosine": float(cosine),
        "first_direction": float(spectrum(features - features.mean(0))[0]),
    }


def verdict(own, fresh, probe):
    """One sentence for a worried user."""
    if own["feature_std"] < 0.02 or own["rankme"] < 1.5:
        return "collapsed: the encoder says nearly the same of every film. Train again with a lower --lr, a higher --ema or a longer --warmup"
    if probe and probe["target encoder"] < probe["random weights"] - 1:
        return "not collapsed, yet it knows less than random weights do: too short a training, or films unlike those of the table"
    if own["rankme"] < fresh["rankme"] and own["feature_std"] < fresh["feature_std"]:
        return "suspicious: less variety than random weights have. Normal in the first tenth of a training; later, lower --lr or raise --ema"
    more = probe and probe["target encoder"] > probe["random weights"]
    return "healthy: films differ in many directions" + (
        ", and a probe finds more than in random weights" if more else ""
    )


# ------------------------------------------------------------------------------------------------ views
def views(config, device):
    """What the model is shown: two crops of a film, their domain transitions, the mask, what is left as context. No weights needed."""
    size, patch = config.image or 128, config.patch or 16
    if size % patch:
        raise Stop(f"--image {size} is not a multiple of --patch {patch}")
    films, _ = open_set(config, 20)
    rows, captions, grid = [], [], size // patch
    for i in evenly(named(config.table, films), config.films):
        film, generator, rng = (
            films[int(i)],
            keyed(config.seed, int(i)),
            np.random.default_rng((config.seed, int(i))),
        )
        boxes, flips = augment.sample_boxes(rng, *film.shape)
        crops = np.stack([augment.crop(film, box, size, flip) for box, flip in zip(boxes, flips)])
        both = augment.to_float(torch.from_numpy(crops))[None]  # (1, 2, H, W)
        y = augment.apply_jitter(both, augment.sample_jitter(1, generator))[0][
            :, None
        ]  # (2, 1, H, W)
        actions = augment.sample_actions(2, generator)
        x = augment.apply_action(y, actions)
        keep, masked = sample_masks(2, grid, generator)
        rows.append([pictures.draw_boxes(film, boxes, ["#ffb000", "#4cc9f0"])])
        captions.append([", ".join(f"view {v + 1} mirrored" for v in (0, 1) if flips[v])])
        for v in (0, 1):
            b, c, g, s = actions[v].tolist()
            rows[-1] += [grey(y[v]), grey(x[v]), tokens_picture(x[v], keep[v], masked[v], patch)]
            captions[-1] += [
                None,
                f"b {b:.2f} c {c:.2f} g {g:.2f} blur {s:.1f}",
                f"{len(keep[v])} seen, {len(masked[v])} asked",
            ]
    titles = [
        "film, boxes 1 and 2",
        *(f"{what} {v}" for v in (1, 2) for what in ("target y", "T_a(y)", "context x")),
    ]
    words = f"{len(rows)} films as a training step sees them; red: hidden and asked for, black: hidden only"
    finish(
        config,
        {"films": len(rows), "image": size, "patch": patch},
        words,
        views=pictures.grid(rows, captions, titles, cell=170),
    )


def tokens_picture(image, keep, masked, patch):
    """A context: patches in `keep` as they are, those in `masked` red, the rest nearly black. (1, H, W), (K,), (M,) → uint8 (H, W, 3)"""
    grid = image.shape[-1] // patch
    kind = (
        torch.zeros(grid * grid, dtype=torch.long)
        .scatter(0, keep, 1)
        .scatter(0, masked, 2)
        .view(grid, grid)
    )
    kind = kind.repeat_interleave(patch, 0).repeat_interleave(patch, 1).numpy()[..., None]
    shown = grey(image)[..., None].repeat(3, 2)
    return np.where(
        kind == 1,
        shown,
        np.where(kind == 2, shown // 6 + np.array([120, 30, 30], np.uint8), shown // 6),
    ).astype(np.uint8)


# ------------------------------------------------------------------------------------------------ gallery
@dataclasses.dataclass
class Gallery:
    weights: str = flag(
        None,
        "last.pt of a run or its folder, the authors' file [newest pre-training run under runs/]",
    )
    data: str = flag(
        None,
        "films that rcdm.py learns to paint from [those of the run]; everything else looks at synthetic films",
    )
    out: str = flag(None, "folder of all results [runs/gallery]")
    docs: str = flag("docs", "folder of the pictures")
    steps: int = flag(None, "training steps of each of the two RCDM decoders [rcdm.py's]")
    seed: int = flag(0, "of everything random")
    device: str = flag("auto", "auto, cpu, cuda or cuda:1")


PAGES = {
    "views": ["views"],
    "domain": ["choices", "errors"],
    "correspondence": ["maps"],
    "health": ["health"],
    "surprise": ["surprise"],
    "rcdm-local": ["samples", "artefacts"],
    "rcdm-global": ["samples"],
}  # folder: its pictures


def gallery(config, device):
    """Every analysis on synthetic films, which may be shown, and the two RCDM decoders; then all pictures, made small, into --docs as FOLDER_PICTURE.png."""
    weights, out, docs = str(find_weights(config)), Path(config.out), Path(config.docs)
    for name in ("views", "domain", "correspondence", "health", "surprise"):
        Own, command = COMMANDS[name]
        (out / name).mkdir(parents=True, exist_ok=True)
        print(f"\n{name}", flush=True)
        command(Own(weights=weights, out=str(out / name), seed=config.seed), device)
    for mode in ("local", "global"):
        words = [
            sys.executable,
            str(Path(__file__).with_name("rcdm.py")),
            "--mode",
            mode,
            "--weights",
            weights,
            "--out",
            str(out / f"rcdm-{mode}"),
            "--seed",
            str(config.seed),
            "--device",
            config.device,
            *["--artefacts"][: mode == "local"],
            *(["--steps", str(config.steps)] if config.steps else []),
            *(["--data", config.data] if config.data else []),
        ]
        print("\n" + shlex.join(words), flush=True)
        if subprocess.run(words).returncode:
            raise Stop(f"rcdm.py --mode {mode} failed (above); the same command goes on")
    docs.mkdir(parents=True, exist_ok=True)
    for folder, names in PAGES.items():
        for name in names:
            page = Image.open(out / folder / f"{name}.png").convert("RGB")
            pictures.save(page.quantize(64), docs / f"{folder}_{name}.png")
    print(f"\npictures {docs}/*.png, numbers {out}/*/result.json")


COMMANDS = {
    "gallery": (Gallery, gallery),
    "domain": (Common, domain),
    "correspondence": (Correspondence, correspondence),
    "health": (Health, health),
    "surprise": (surprise.Config, surprise.command),
    "views": (Views, views),
    "ablation": (ablation.Config, ablation.command),
}


def main():
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(__doc__)
        return
    if name not in COMMANDS:
        raise Stop(f"{name}: no such command; one of {', '.join(COMMANDS)}")
    Config, command = COMMANDS[name]
    config = runtime.parse(Config, f"{command.__doc__}", sys.argv[2:], f"analyze.py {name}")
    config.out = config.out or f"runs/{name}"
    if getattr(config, "seed", 0) < 0:
        raise Stop(f"--seed {config.seed}: 0 or more is wanted")
    try:
        Path(config.out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Stop(f"--out {config.out}: {error.strerror}") from None
    command(config, runtime.start_team(config.device).device)


if __name__ == "__main__":
    runtime.main(main)
