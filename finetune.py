"""Fine-tune an encoder on one of the paper's eight benchmarks, or on your own films. (Sec. B.3)

    python finetune.py --task csv --data FOLDER --labels FILE.csv        # laptop: your own films
    python finetune.py --task shenzhen --seeds 5       # one GPU: films in $CXR/shenzhen
    torchrun --nproc_per_node=8 finetune.py --task vindr --weights FILE  # eight GPUs, same code
    python finetune.py --eval --weights runs/FILE/seed0/best.pt --data FOLDER --labels OTHER.csv

Training starts from the newest pre-training run under runs/ or from --weights; --weights none is
from scratch; --freeze trains only a head on frozen features. The model is chosen on validation
films. The test films are used only after training. In a table, empty cells and ? are unknown and
ignored, and so is -1 without --uncertain; "no X" means that X is absent (docs/data.md). If neither
a column patient_id nor the file names tell the patients, every film counts as a patient of its own,
and the test may then include patients seen in training.

As in pretrain.py, no random number depends on the process, and Ctrl-C saves: the same command
resumes. But a batch that does not divide by the processes is made smaller (seedrun.share_batch).
--out receives result.json and films.csv (every film as it was understood), and in seed*/
config.json, log.csv where steps are trained, best.pt, predictions.csv, result.json, and roc.csv
with roc.png or, for segmentation, cases.png.
"""

import dataclasses
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Subset
from tqdm import tqdm

import augment
from data import EvalExamples, TrainExamples, make_loader, open_examples
from lab import report
from model import SIZES, Classifier, Segmenter, ViT
from plumbing import checkpoint, launch, metrics, results, seedrun
from plumbing.benchmarks import SEGMENT_RECIPE, TASKS, find_root, load_task
from plumbing.checkpoint import StopRequest
from plumbing.keys import DROP_PATH, TRAIN_JITTER, torch_generator
from plumbing.launch import Loader, UserError, flag
from plumbing.pack import UnreadableFilms
from plumbing.seedrun import SeedRun
from plumbing.splits import draw_few
from plumbing.weights import load_encoder, make_vit, resized

# ---- Recipe
# Every task has a recipe (TASKS in plumbing/benchmarks.py), which flags override. Recipes come from
# the paper; epochs and batch of tasks outside results.PUBLISHED are ours.
MIN_STEPS = 1000  # where films are few, epochs are raised to reach this: docs/finetuning.md
# The paper's lr 1e-4 and drop path 0.6 are for ViT-Base with 12 blocks. Networks narrower than
# ViT-Small, such as our `tiny` with 4 blocks, get a larger lr and less drop path.
SMALL_PRETRAINED = dict(lr=4e-4, drop_path=0.1)
SMALL_FROM_SCRATCH = dict(lr=1e-3, drop_path=0.1)  # also used when a segmentation decoder is new

# Flags that may differ when a run resumes. Films and labels are compared by content, each seed has
# its own folder. --max_steps adds a validation where it stops a run, and that may be the best one;
# the other flags change results by rounding at most.
MAY_CHANGE = set("out data labels uncertain eval seed seeds device workers micro max_steps".split())
MAY_CHANGE |= set("log_every save_every compile memory_gb".split())


@dataclasses.dataclass
class Config(launch.TrainFlags):
    """The flags; those of every training (--micro, --precision ...) are in plumbing/launch.py."""

    task: str = flag("csv", "what to learn", list(TASKS))
    data: str = flag(None, "folder of the films [$CXR/<task>, else data/<task>]")
    labels: str = flag(
        None,
        "task csv: table filename,label[,patient_id][,split], where label is a class, 'a|b' for "
        "two, or normal; in place of label: a 0/1 column per class, or a column mask of files",
    )
    column: str = flag(
        None, "task csv: what to learn, A or A,B [mask, else label, else all 0/1 columns]"
    )
    uncertain: str = flag(
        "ignore", "task csv: what -1 counts as", ["ignore", "positive", "negative"]
    )
    weights: str = flag(
        None,
        "a run's folder, encoder.pt or last.pt, the authors' file, a ViT of MoCo-v3, DINO, MAE, "
        "RAD-DINO or timm, or none: random [newest run's, never the demo's]; with --eval best.pt",
    )
    out: str = flag(
        None, "folder of the run [runs/<name of the table or task>; with --eval beside best.pt]"
    )
    eval: bool = flag(False, "do not train: test the fine-tuned checkpoint --weights")
    freeze: bool = flag(False, "train only the head: linear probe, or the decoder of segmentation")
    head: str = flag(
        None,
        "how the classifier starts: random (the paper's), or as the linear probe, which is safer "
        "with few films [probe for task csv]",
        ["random", "probe"],
    )
    pool: str = flag(
        None,
        "what the classifier sees of the output tokens: their mean (the paper's), or the mean of "
        "each of 4 × 4 cells of the film, which tells what lies where [mean; task csv: cells]",
        ["mean", "cells"],
    )
    seed: int = flag(0, "first seed: of new layers, order and augmentation")
    seeds: int = flag(
        1, "number of seeds, the paper's is five; the result is mean and standard deviation"
    )
    fraction: float = flag(1.0, "share of the training films to use, the same for all seeds")
    shots: int = flag(None, "training films per class, the same for all seeds; chestdr: its lists")
    draw: int = flag(0, "another number draws other films for --fraction or --shots")
    size: str = flag(None, "network from scratch, with --weights none [base]", list(SIZES))
    image: int = flag(None, "side of a film for the network, px [as pre-trained; scratch 224]")
    patch: int = flag(None, "side of a patch, px [as pre-trained; scratch 16; siim and rsna_seg 8]")
    batch: int = flag(None, "films per step over all GPUs [from the task]")
    epochs: int = flag(None, "passes over the training films; sets the schedule [from the task]")
    lr: float = flag(None, "peak learning rate of the last layer [from the task]")
    weight_decay: float = flag(None, "AdamW's; none on biases and norms [from the task]")
    layer_decay: float = flag(None, "learning rate of a layer / that of the next [from the task]")
    drop_path: float = flag(
        None,
        "chance that a film skips attention or MLP (each by itself) in the last block; falls "
        "linearly to 0 at the first [from the task]",
    )
    warmup: float = flag(None, "epochs of linear warm-up [from the task, at most a tenth of all]")
    patience: int = flag(None, "validations without a new best before the end [from the task]")
    ten_crop: bool = flag(False, "test on five crops of a film and their mirror images, averaged")
    memory_gb: float = flag(16.0, "keep the films decoded if all processes need less than this")
    log_every: int = flag(10, "steps between rows of log.csv")
    save_every: int = flag(500, "steps between checkpoints, beside those at every validation")
    # Set by fill_in, no flag, but a part of the recipe that config.json keeps.
    is_cut: bool = False  # whether the set has more training films than are used


def check_flags(args: Config):
    """Raise UserError on flags that make no sense, alone or together."""
    is_scratch = args.weights == "none"
    for is_wrong, message in (
        (not 0 < args.fraction <= 1, "--fraction must be above 0 and at most 1"),
        (args.shots and args.fraction < 1, "--shots does not go with --fraction"),
        (args.eval and args.weights in (None, "none"), "--eval needs --weights FILE, a best.pt"),
        (args.size and not is_scratch, "--size is for --weights none: other weights fix it"),
    ):
        if is_wrong:
            raise UserError(message)
    seedrun.refuse_useless_flags(args)


def fill_in(args: Config, kind, shape, films, team, is_cut=False) -> tuple[Config, list[str]]:
    """Fill in every setting that the user left open. → (a filled copy of args, reasons)

    What the user gave comes first, then our settings for small networks, then the task's recipe.
    The batch is at most the number of films. Warm-up is at most a tenth of the epochs, unless the
    user says so. kind: see TaskData. shape: the dict that encoder_shape returns. films: number of
    films to train on, or with --eval to test. is_cut: whether the set has more to train on.
    """
    seedrun.refuse_useless_flags(args, kind)
    is_own_masks = kind == "mask" and args.task == "csv"
    defaults = dict(SEGMENT_RECIPE if is_own_masks else TASKS[args.task].recipe)
    defaults["image"] = args.image or shape["image"]
    defaults["patch"] = seedrun.usual_patch(defaults, shape)
    defaults["workers"] = 8 if team.device.type == "cuda" else 0
    reasons = [results.whose_recipe(args.task)]
    if shape["dim"] < SIZES["small"]["dim"]:
        is_new = kind == "mask" or args.weights == "none"
        ours = SMALL_FROM_SCRATCH if is_new else SMALL_PRETRAINED
        defaults |= ours
        taken = [f"{name} {ours[name]:g}" for name in ours if getattr(args, name) is None]
        if taken:
            reasons.append(f"For a small network we take {' and '.join(taken)}.")
    left_open = {name: value for name, value in defaults.items() if getattr(args, name) is None}
    filled = dataclasses.replace(args, **left_open, is_cut=is_cut)
    filled.precision = launch.choose_precision(args.precision, team.device)

    reasons += seedrun.share_batch(filled, films, team.size)  # sets batch and micro
    per_epoch = max(1, films // filled.batch)
    is_published = args.task in results.PUBLISHED and not is_cut
    may_raise = args.epochs is None and not is_published
    if may_raise and filled.epochs * per_epoch < MIN_STEPS:
        filled.epochs = math.ceil(MIN_STEPS / per_epoch)
        reasons.append(f"The films are few: epochs are raised to reach {MIN_STEPS} steps.")
    if args.warmup is None:
        filled.warmup = min(filled.warmup, filled.epochs / 10)
    elif args.warmup >= filled.epochs:
        raise UserError(f"--warmup {args.warmup:g} must be less than the {filled.epochs} epochs")
    if filled.image % filled.patch:
        raise UserError(f"--image {filled.image} is not a multiple of --patch {filled.patch}")
    return filled, reasons


# ---- Weights and model
def encoder_shape(args: Config, weights, say=None) -> dict:
    """image, patch, dim, depth and heads of the encoder as pre-trained, or as --size says."""
    if weights:
        return load_encoder(weights, say=say).config
    size = SIZES[args.size or "base"]
    return dict(image=224, patch=16, dim=size["dim"], depth=size["depth"], heads=size["heads"])


def make_model(args: Config, weights, kind, labels):
    """Put a new head on the encoder, which is resized to --image and --patch where these differ."""
    if weights:
        vit = resized(load_encoder(weights), args.image, args.patch, args.drop_path)
    else:
        shape = encoder_shape(args, None) | {"image": args.image, "patch": args.patch}
        vit = ViT(**shape, drop_path=args.drop_path)
    return add_head(vit, kind, labels, args.pool)


def add_head(vit, kind, labels, pool):
    """A linear layer on the pooled tokens to classify, a U-Net decoder to segment."""
    return Segmenter(vit) if kind == "mask" else Classifier(vit, len(labels), pool)


def make_finetuned(saved: dict, device):
    """Make the model that a best.pt holds. saved: as seedrun.load_best gives it."""
    model = add_head(make_vit(saved["config"]), saved["kind"], saved["labels"], saved["pool"])
    seedrun.load_finetuned(model, saved)
    return model.to(device).eval()


def layer_groups(model, weight_decay, layer_decay) -> list[dict]:
    """Group the parameters for AdamW so that a layer learns the more slowly the earlier it is.

    Layer k of a ViT with L blocks learns at layer_decay^(L + 1 - k) of the learning rate: the
    pre-trained edges and textures of the early layers are kept, the late layers adapt to the task.
    k is 0 for what comes before the blocks, i + 1 for block i, L + 1 for the final norm and the
    head. Biases, norms, positions and class tokens have no weight decay. Frozen parameters are left
    out.
    → [{params, weight_decay, scale}]
    """
    last = len(model.vit.blocks) + 1
    groups = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = last
        # vit.tokens: class tokens of other papers' ViTs
        if name.startswith(("vit.patch_embed.", "vit.pos_embed", "vit.tokens")):
            layer = 0
        elif name.startswith("vit.blocks."):
            layer = int(name.split(".")[2]) + 1
        is_matrix = name.endswith(".weight") and parameter.dim() > 1
        decay = weight_decay if is_matrix else 0.0
        if (layer, decay) not in groups:
            scale = layer_decay ** (last - layer)
            groups[layer, decay] = dict(params=[], weight_decay=decay, scale=scale)
        groups[layer, decay]["params"].append(parameter)
    return list(groups.values())


# ---- Loss, prediction, judgement
@dataclasses.dataclass
class TaskData:
    """The task at hand and its films."""

    kind: str  # labels: each may be present or not; classes: exactly one; mask: segmentation
    labels: tuple
    size: int  # side of the film as the network sees it, px
    in_memory: bool  # decode every film once and keep it
    unreadable: UnreadableFilms
    films: dict = dataclasses.field(default_factory=dict)  # {"train", "val", "test"}: their films
    root: Path = Path()  # --data, below which films are named
    against: str = ""  # of two exclusive classes, the one that counts as 0; the other is the label
    without_truth: frozenset = frozenset()  # indices of test films whose true mask nobody knows

    def open(self, split: str, examples: list):
        """Open the films of a split."""
        self.films[split] = open_examples(examples, self.size, self.in_memory)


def loss_of(kind, logits, truth):
    """Compute the loss of every film. logits, truth (B, c), of masks (B, H, W) → (B,)

    labels: binary cross entropy, mean over the classes; an unknown label (NaN) counts as loss 0.
    classes: cross entropy. mask: binary cross entropy, mean over the pixels, plus 1 - Dice.
    """
    logits = logits.float()
    if kind == "classes":
        return F.cross_entropy(logits, truth, reduction="none")  # truth is 1 for the class, else 0
    is_known = ~truth.isnan()
    entropy = F.binary_cross_entropy_with_logits(logits, truth.nan_to_num(), reduction="none")
    entropy = (entropy * is_known).flatten(1).mean(1)
    if kind == "labels":
        return entropy
    guess = logits.sigmoid().flatten(1)  # (B, H W)
    truth = truth.flatten(1)
    overlap = 2 * (guess * truth).sum(1)
    dice = (overlap + 1e-5) / (guess.sum(1) + truth.sum(1) + 1e-5)  # nothing against nothing is 1
    return entropy + 1 - dice


@torch.no_grad()
def predict(network, task: TaskData, split, args, team, ten_crop=False) -> dict:
    """Run the network over the films of a split. → {index of the film: row}, in every process

    A row holds the outputs averaged over the film's crops (c,), or score_masks's three numbers.
    Films that cannot be read are named and have no row.
    """
    films = task.films[split]
    mine = Subset(EvalExamples(films, ten_crop), range(team.rank, len(films), team.size))
    batch = max(1, args.micro // 10) if ten_crop else args.micro
    workers = 0 if task.in_memory else args.workers  # decoded films need no helpers
    rows = {}
    unreadable = {}
    for item in Loader(mine, batch_size=batch, num_workers=workers):
        views = augment.to_float(item["views"].to(team.device))  # (b, v, H, W): v crops per film
        with launch.autocast(team.device, args.precision):
            output = network(views.flatten(0, 1)[:, None]).float()  # (b v, c) or (b, H, W)
        if task.kind == "mask":
            batch_rows = score_masks(output, item["truth"])
        else:
            batch_rows = output.view(*views.shape[:2], -1).mean(1).cpu().numpy()  # (b, c)
        for place, index in enumerate(item["index"].tolist()):
            name = item["unreadable"][place]
            if name:
                unreadable[name] = item["reason"][place]
            else:
                rows[index] = batch_rows[place]
    for other_rows, other_unreadable in team.gather_objects((rows, unreadable)):
        rows |= other_rows
        unreadable |= other_unreadable
    for name, reason in sorted(unreadable.items()):
        task.unreadable.note(name, reason)
    if not rows:
        raise UserError(f"none of the {len(films)} {split} films can be read")
    return dict(sorted(rows.items()))


def score_masks(logits, truth) -> np.ndarray:
    """Score predicted masks (b, H, W). → (b, 3): Dice, 1 if the true mask is not empty, loss

    The Dice over films that have a mask is also reported, because where most have none, empty
    predictions score high.
    """
    losses = loss_of("mask", logits, truth.to(logits.device)).tolist()
    guess = (logits > 0).cpu().numpy()
    truth = truth.numpy() > 0.5
    dices = [metrics.dice(g, t) for g, t in zip(guess, truth, strict=True)]
    return np.array([dices, truth.any((1, 2)), losses]).T


def truth_of(films, rows) -> np.ndarray:
    """The truth (n, c) of the films that have a row, in their order; NaN: not known."""
    return np.array([films.examples[i].truth for i in rows], float)


def solve_head(model, task: TaskData, args, team):
    """Write the linear probe into the head: logistic regression on features of un-augmented films.

    It has one optimum, which is computed rather than trained; validation chooses its penalty.
    """
    model.eval()
    train = predict(model.features, task, "train", args, team)
    val = predict(model.features, task, "val", args, team)
    train_x, val_x = (np.stack(list(rows.values())) for rows in (train, val))  # features (n, D)
    train_y = truth_of(task.films["train"], train)  # (n, c)
    val_y = truth_of(task.films["val"], val)
    weight, bias = metrics.fit_probe(train_x, train_y, val_x, val_y)
    with torch.no_grad():
        model.head.weight.copy_(torch.from_numpy(weight.T))
        model.head.bias.copy_(torch.from_numpy(bias))


# ---- Training one seed
def jitter_batch(item, kind, key, batch_positions, batch, device):
    """Send a loaded micro-batch to the device, brightness and contrast changed at random.

    key: (seed, step). The factors are drawn for all `batch` films of the step and taken at
    batch_positions (b,), so that it does not matter how processes and micro-batches divide it.
    → images (b, 1, H, W), truth
    """
    probability = 0.8 if kind == "mask" else 1.0  # the authors' code jitters 80 % to segment
    generator = torch_generator(TRAIN_JITTER, *key)
    jitter = augment.sample_jitter(batch, generator, probability, (0.8, 1.2))  # (B, 2)
    jitter = jitter[batch_positions].to(device)
    images = augment.to_float(item["view"].to(device, non_blocking=True))
    change = augment.jitter_for_segmentation if kind == "mask" else augment.change_tone
    images = change(images, jitter[:, 0], jitter[:, 1])[:, None]
    return images, item["truth"].to(device, non_blocking=True)


def train_step(run: SeedRun, forward, loader, args, task: TaskData, team):
    """Accumulate the gradients of a step, clip them, update. → this process's mean loss"""
    run.model.train()
    key = (run.seed, run.step)
    # Drop path is drawn for the whole batch, so that it does not matter how processes and
    # micro-batches divide it. A frozen encoder drops none.
    blocks = len(run.model.vit.blocks)
    all_noise = torch.rand(args.batch, blocks, 2, generator=torch_generator(DROP_PATH, *key))
    share = args.batch // team.size  # films per step of this process
    micro_batch_count = share // args.micro
    losses = []
    for k in range(micro_batch_count):
        item = next(loader)
        task.unreadable.note_batch(item)
        first = team.rank * share + k * args.micro
        batch_positions = torch.arange(first, first + args.micro)
        images, truth = jitter_batch(item, task.kind, key, batch_positions, args.batch, team.device)
        drop_noise = None if args.freeze else all_noise[batch_positions].to(team.device)
        is_last = k + 1 == micro_batch_count
        with launch.averaging_gradients(forward, only_if=is_last):
            with launch.autocast(team.device, args.precision):
                losses_of_films = loss_of(task.kind, forward(images, drop_noise), truth)
                loss = losses_of_films.mean() / micro_batch_count
            loss.backward()
        losses.append(loss.detach())
    launch.clip_and_step(run.model, run.optimizer, args.clip)
    return torch.stack(losses).sum()


def set_learning_rates(run: SeedRun, args) -> float:
    """Warm-up, then cosine; each layer learns at its share. → the last layer's learning rate"""
    warmup = round(args.warmup * run.steps.per_epoch)
    lr = launch.warmup_cosine(run.step, run.steps.total, warmup, args.lr, args.min_lr)
    for group in run.optimizer.param_groups:
        group["lr"] = lr * group["scale"]
    return lr


def train(run: SeedRun, args, task: TaskData, team):
    """Train until the schedule ends or validation has not improved for long.

    After SIGTERM or Ctrl-C the step is finished (with a validation if one is due), the seed is
    saved and the script ends.
    """
    end = run.steps.end
    examples = TrainExamples(task.films["train"], run.seed)
    loader = iter(make_loader(examples, args, team, args.workers, run.seed, run.step, end))
    forward = launch.prepare_forward(run.model, args.compile, team, run.steps.total)
    log = run.open_log(args.batch) if team.lead else None
    bar = tqdm(None, f"seed {run.seed}", end, disable=not team.lead, unit="step", initial=run.step)
    is_stopping = False
    with StopRequest() as stop, bar:
        while run.step < end and run.best.stale < args.patience and not is_stopping:
            lr = set_learning_rates(run, args)
            loss = train_step(run, forward, loader, args, task, team)
            run.step += 1
            bar.update()
            should_validate = run.step % run.steps.between_validations == 0 or run.step == end
            if should_validate or run.step % args.log_every == 0:
                row = {"epoch": run.step / run.steps.per_epoch, "lr": lr, "val": "", "val_loss": ""}
                row["loss"] = run.mean_loss(loss, team)
                if should_validate:
                    row["val"], row["val_loss"] = validate(run, args, task, team)
                    bar.set_postfix_str(f"val {row['val']:.2f}, best {run.best}")
                if team.lead:
                    row["images_per_s"], _ = log.speed(run.step)
                    log.row(run.step, **row)
            is_stopping = team.any(stop.requested)
            should_save = should_validate or is_stopping or run.step % args.save_every == 0
            if team.lead and should_save:
                run.save()
    if is_stopping:
        stop.end(team, f"step {run.step} in {run.folder}")  # the script ends here


def validate(run: SeedRun, args, task: TaskData, team) -> tuple[float, float]:
    """Judge the model on the validation films. If it is the best so far, save best.pt and, per
    class, the threshold at which a film counts as positive.

    → the task's metric in percent, 0 where it is undefined, so that the loss alone tells which
    model is best; the mean loss
    """
    rows = predict(run.model.eval(), task, "val", args, team)
    table = np.stack(list(rows.values()))  # (n, c), or (n, 3) as score_masks says
    truth = truth_of(task.films["val"], rows)  # (n, c); (n, 0) of masks, which have none
    value, _ = results.judge(task.kind, task.labels, table, truth)
    if task.kind == "mask":
        losses = table[:, 2]  # see score_masks
    else:
        losses = loss_of(task.kind, torch.tensor(table), torch.tensor(truth, dtype=torch.float32))
    loss = float(losses.mean())
    is_best = run.best.update(value, loss, run.step)  # of equals, the lower loss
    if is_best and team.lead:
        run.about["thresholds"] = []  # of masks none
        if task.kind != "mask":
            scores = results.probabilities(task.kind, table)
            run.about["thresholds"] = list(map(metrics.youden_threshold, scores.T, truth.T))
        run.save_best()
    return value or 0.0, loss


def train_one_seed(seed, args: Config, task: TaskData, weights, folder: Path, team):
    """Train one seed, or resume it where it stopped, and test it. → result"""
    # ---- 1. The model; a finished seed returns its result here.
    torch.manual_seed(seed)
    model = make_model(args, weights, task.kind, task.labels).to(team.device)
    model.vit.requires_grad_(not args.freeze)
    settings = {name: value for name, value in vars(args).items() if name not in MAY_CHANGE}
    examples = {split: films.examples for split, films in task.films.items()}
    recipe = seedrun.recipe_of(settings, weights, model.vit, task.labels, examples)
    steps = seedrun.count_steps(args, task.kind, recipe["films"])
    result = seedrun.begin_or_finished(folder, recipe, steps.end, team)
    if result:
        value = results.with_interval(result["value"], result.get("interval"))
        metric = results.metric_of(task.kind, result["per_class"])
        team.say(f"seed {seed}: finished before, test {metric} {value}")
        return result

    # ---- 2. AdamW with a learning rate per layer; the last checkpoint, if there is one.
    groups = layer_groups(model, args.weight_decay, args.layer_decay)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.999), fused=True)
    about = {"config": model.vit.config, "task": args.task, "recipe": recipe}
    about |= {"kind": task.kind, "labels": list(task.labels), "against": task.against}
    about["pool"] = args.pool
    about |= seedrun.remember([*examples["train"], *examples["val"]])
    run = SeedRun(seed, folder, steps, model, optimizer, about)
    run.resume()
    if run.step:
        team.say(f"seed {seed}: resuming at step {run.step} of {steps.total}")

    # ---- 3. The linear probe: it starts the head (--head probe) or is all there is (--freeze).
    starts_as_probe = task.kind != "mask" and (args.freeze or args.head == "probe")
    if starts_as_probe and run.step == 0:
        solve_head(model, task, args, team)
        validate(run, args, task, team)

    # ---- 4. Training, and the test of the model that was best on validation.
    if steps.total > 0:  # a frozen classifier has no steps: its head is solved, not trained
        train(run, args, task, team)
    return finish(run, args, task, team)


def finish(run: SeedRun, args, task: TaskData, team) -> dict:
    """Test the best model of a seed and write result.json. → the result"""
    team.wait()  # until best.pt is written
    saved = seedrun.load_best(run.folder / "best.pt")
    model = make_finetuned(saved, team.device)
    result = test(model, task, args, run.folder, team, saved.get("thresholds"))
    result["films"] = len(task.films["train"])
    val = run.best.value
    result |= {"val": val, "best_step": run.best.step, "steps": run.step}
    result["steps_in_all"] = run.steps.total
    # `over` is False when --max_steps ended the run early.
    result["over"] = run.step >= run.steps.total or run.best.stale >= args.patience
    if team.lead:
        run.save_result(result)
    words = results.with_interval(result["value"], result["interval"])
    which = f"model at step {run.best.step}"
    if run.best.step == 0:  # only a head that was solved is validated before the first step
        which = "linear probe" if args.freeze else "linear probe that it starts from"
    team.say(
        f"seed {run.seed}: test {results.metric_of(task.kind, result['per_class'])} {words}, "
        f"of the {which}, the best on validation ({results.with_interval(val, None)})"
    )
    return result


def test(model, task: TaskData, args, folder: Path, team, thresholds) -> dict:
    """Use the test films: judge the model, write predictions.csv, and ROC curves or cases.png.

    thresholds: those of best.pt, or None. → what result.json says of it, in every process
    """
    films = task.films["test"]
    rows = predict(model, task, "test", args, team, args.ten_crop)
    # Films whose true mask nobody knows get no score.
    rows |= {i: np.full(3, np.nan) for i in task.without_truth.intersection(rows)}
    result = {}
    if team.lead:  # the redraws of the interval take some seconds
        truth = truth_of(films, rows)
        result = results.judge_test(task, rows, truth, thresholds)
        results.write_predictions(folder, task, rows)
        if task.kind == "mask":
            results.draw_cases(folder, model, EvalExamples(films), rows, team.device)
        else:
            results.write_roc(folder, task, rows, truth, result["operating_points"])
    result = team.gather_objects(result)[0]
    unreadable = team.gather_objects(list(task.unreadable.reasons))
    return result | {"bad": sorted(set().union(*unreadable))}


# ---- Main
def find_examples(args: Config, root, trained=None):
    """Find the films and labels of the task. → Splits; arguments: see benchmarks.load_task"""
    flags = dict(table=args.labels, shots=args.shots, column=args.column, uncertain=args.uncertain)
    splits = load_task(args.task, root, trained=trained, **flags)
    if splits.drawn and args.draw:
        raise UserError(f"--draw does nothing with the set's own lists of --shots {args.shots}")
    return splits


def open_task(args: Config, splits, size, root, team) -> TaskData:
    """Open the test films of a task, and the validation films where something is trained."""
    total = sum(counts["films"] for counts in splits.counts().values())
    film_bytes = 1.2 * (2 * size) ** 2  # short side at most 2 · size, a bit longer than wide
    in_memory = total * film_bytes * team.size < args.memory_gb * 1e9
    unreadable = UnreadableFilms(total)
    about = dict(root=root, against=splits.against)
    task = TaskData(splits.kind, splits.labels, size, in_memory, unreadable, **about)
    task.open("test", splits.test)
    if not args.eval:
        task.open("val", splits.val)
    return task


def test_finished(args: Config, weights, root, out, team):
    """--eval: test best.pt on a task's test films, on a table's, or on all films of a folder."""
    saved = seedrun.load_best(weights)
    about = checkpoint.sources(data=root, labels=args.labels, weights=weights)
    checkpoint.refuse_other_result(out, about)
    trained = (saved["kind"], tuple(saved["labels"]), saved.get("against", ""))
    splits = find_examples(args, root, trained)
    splits, without_truth = seedrun.fit_to_model(splits, saved, weights)
    team.say(results.describe_weights(weights, "as asked", saved["config"], "fine-tuned"))
    team.say(results.describe_task(root, splits))
    # Of the filled settings only batch, micro and precision are used.
    filled, _ = fill_in(args, splits.kind, saved["config"], len(splits.test), team)
    task = open_task(args, splits, saved["config"]["image"], root, team)
    task.without_truth = without_truth
    model = make_finetuned(saved, team.device)
    result = test(model, task, filled, out, team, saved.get("thresholds"))
    if task.kind == "mask":
        results.write_masks(out, task, EvalExamples(task.films["test"]), model, team)
    recipe = saved.get("recipe", {}) | about
    result["films"] = recipe.get("films")
    summary = results.summarise(out, recipe, splits, about["weights"], [result], team)
    results.conclude(out, summary, team)


def judge_beside(args, task: TaskData, weights, out, summary: dict, team):
    """Judge linear probes of the same films beside the model, and add that to result.json.

    Comparing with probes of the starting encoder, of random weights and of raw pixels shows what
    fine-tuning gained. Whatever goes wrong here costs no result: all are written already.
    """
    folders = [out / f"seed{seed}" for seed in range(args.seed, args.seed + args.seeds)]
    try:
        scores = [results.read_predictions(folder, task) for folder in folders]
        torch.manual_seed(args.seed)
        vit = make_model(args, weights, task.kind, task.labels).vit.to(team.device).eval()
        are_few = args.fraction < 1 or bool(args.shots)
        asked = (vit, weights is None, args.seed, args.pool, are_few)
        summary["probes"] = report.beside(task.films, scores, *asked)
        checkpoint.write_json(out / "result.json", summary)
    except Exception as error:
        print(f"warning: no linear probes beside the model: {checkpoint.brief(error)}", flush=True)


def main():
    # ---- 1. What was asked for, and the processes that work on it.
    args = launch.parse(Config, __doc__)
    check_flags(args)
    out = seedrun.choose_out(args)
    team = launch.start_team(args.device)
    if team.lead:
        checkpoint.lock(out)  # refuses to start beside another run in the same folder

    # ---- 2. The folder of the films, and the weights; --eval only tests.
    root = find_root(args.task, args.data)
    weights, why = seedrun.choose_weights(args, out)
    if args.eval:
        test_finished(args, weights, root, out, team)
        return team.leave()

    # ---- 3. The films of the task: no patient is in two of the three splits.
    splits = find_examples(args, root)
    shape = encoder_shape(args, weights, team.say)
    team.say(results.describe_weights(weights, why, shape))
    if weights and team.lead:
        splits.notes += checkpoint.warn_of_unfinished(weights)
        splits.notes += report.seen_in_pretraining(weights, root, splits.test)
    team.say(results.describe_task(root, splits))
    task = open_task(args, splits, args.image or shape["image"], root, team)

    # ---- 4. The training films: few may be wanted, the same for all seeds. The recipe.
    examples = splits.train
    if not splits.drawn:  # if splits.drawn, the set's own lists chose them
        examples = draw_few(splits.train, args.fraction, args.shots, args.draw)
    if len(examples) < len(splits.train):
        team.say(results.describe_draw(splits, examples))
    results.refuse_untestable(splits, examples)
    task.open("train", examples)
    films = len(examples)
    is_cut = films < len(splits.train) or results.is_fewer_than_published(splits)
    filled, reasons = fill_in(args, splits.kind, shape, films, team, is_cut)
    steps = seedrun.count_steps(filled, splits.kind, films)
    if shape["dim"] >= SIZES["base"]["dim"] and not args.freeze:
        films_in_all = filled.seeds * steps.end * filled.batch
        reasons += launch.warn_of_cpu(team, films_in_all, "--freeze takes minutes")
    team.say(results.describe_recipe(filled, splits.kind, films, steps, reasons))

    # ---- 5. Each seed is trained and tested.
    seed_results = []
    for seed in range(args.seed, args.seed + args.seeds):
        folder = out / f"seed{seed}"
        seed_results.append(train_one_seed(seed, filled, task, weights, folder, team))

    # ---- 6. Films, and the mean over the seeds; for few films, also linear probes for comparison.
    if team.lead:
        results.write_films(out, splits, root)
    recipe = vars(args) | checkpoint.sources(data=root, labels=args.labels, weights=weights)
    summary = results.summarise(out, recipe, splits, weights, seed_results, team)
    is_over = all(result["over"] for result in seed_results)
    why_not = report.why_not_beside(splits.kind, task.films, is_over, out)
    if why_not:
        team.say(why_not)
    elif why_not is None and team.lead:
        judge_beside(filled, task, weights, out, summary, team)
    results.conclude(out, summary, team)
    team.leave()


if __name__ == "__main__":
    launch.run_script(main)
