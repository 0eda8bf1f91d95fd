"""What is watched while a model pre-trains: speed, finiteness, collapse; the bar and log.csv."""

import time

import torch
from tqdm import tqdm

from plumbing.checkpoint import Log
from plumbing.launch import UserError, warn_of_cpu
from plumbing.metrics import feature_std, rankme

# feature_std and rankme are those of the first films of the batch, two views of each: the more rows
# the higher is RankMe, so only equally many of them compare across batches. (1,024 rows of 768)
HEALTH_FILMS = 512


def describe_network(args, world, kept: int, masked: int, team) -> str:
    """Say what is trained, with how many patches, and how a step is put together, in two lines."""
    trained = sum(p.numel() for p in world.parameters() if p.requires_grad)
    patches = (args.image // args.patch) ** 2
    accumulate = args.batch // team.size // args.micro
    return (
        f"{args.size} ViT, {trained / 1e6:.1f} M trained parameters, {args.image}² px in "
        f"{args.patch}² patches ({kept} kept, {masked} masked of {patches})\n"
        f"batch {args.batch} = {args.micro} films × {accumulate} accumulated × {team.size} "
        f"process{'es' if team.size > 1 else ''}; "
        f"{args.precision} on {team.device}; run in {args.out}"
    )


def describe_length(given, args, recipe: dict, films, train, held, total: int, team) -> str:
    """Say how long the training is, what it has other than its recipe, and that a CPU is too slow.

    given: what the user set; args: the same, filled in. films: all; train, held: numbers of those
    to train on and of those held out. total: steps.
    """
    is_cut = not args.probe and len(held) < args.holdout
    why = " (a tenth of all at most)" if is_cut else ""
    others = len(films) - len(train) - len(held)  # of the patients of held-out films
    rest = f", {others} more of their patients left out" if others else ""
    lines = [f"{len(train)} films to train on, {len(held)} held out{why}{rest}; {total} steps"]
    if given.warmup is None and args.warmup < recipe["warmup"]:
        lines.append(
            f"warm-up: {args.warmup:.3g} of {args.epochs} epochs, the same share as the recipe's "
            f"{recipe['warmup']:g} of {recipe['epochs']}; --warmup sets another"
        )
    if args.recipe == "small" and not args.weights:
        lines.append(
            "weights of other chest films, where you have any, taught more than to begin anew: "
            "--weights FILE (docs/results.md, Continue from weights that exist)"
        )
    if args.recipe == "paper" and args.size in ("base", "large"):
        lines += warn_of_cpu(team, len(train) * args.epochs, "--recipe small is for CPUs")
    return "\n".join(lines)


class Monitor:
    """Watches a pre-training step by step; every args.log_every steps it writes a row of log.csv.

    out: the run's folder. names: the loss terms, without their mean `loss`. start, end: steps done
    before, and when this training ends. total: steps of the whole schedule.
    """

    def __init__(self, out, names, args, team, start, end, total):
        self.out = out
        self.names = names
        self.args = args
        self.team = team
        self.end = end
        self.total = total
        if team.lead:
            columns = ["step", "epoch", "images", "loss", *names, "lr", "momentum"]
            columns += ["feature_std", "rankme", "images_per_s", "data_wait"]
            self.log = Log(out / "log.csv", columns, start, args.batch)
        self.bar = tqdm(total=end, initial=start, unit="step", disable=not team.lead, smoothing=0.1)
        self.is_finite = torch.ones((), device=team.device)  # stays there: reading it waits
        self.waited = 0.0  # seconds since the last row

    def __enter__(self):
        return self

    def __exit__(self, error, *_):
        self.bar.close()  # so that an error stands on a line of its own
        if error is None and self.end <= self.bar.n < self.total:
            self.team.say(
                f"stopped at step {self.bar.n:,} of {self.total:,} by --max_steps; the same "
                "command without it resumes. What it has learnt so far:"
            )

    def timed(self, loader):
        """Pass on what the loader gives, and measure how long the training waits for it."""
        items = iter(loader)
        while True:
            began = time.perf_counter()
            item = next(items, None)
            self.waited += time.perf_counter() - began
            if item is None:
                return
            yield item

    def update(self, done, losses, pooled, norm, lr, momentum):
        """Take note of a finished step; every rank calls it. Raises UserError when it diverged.

        done: steps so far. losses: {name: one value per micro-batch}. pooled: this rank's targets,
        averaged over their patches (2b, D). norm: of the gradient.
        """
        self.bar.update()
        self.is_finite *= torch.isfinite(losses["loss"]).all() * torch.isfinite(norm)
        if done % self.args.log_every and done != self.end:
            return
        self.check(done)
        means = self.team.mean(torch.stack([values.mean() for values in losses.values()]))
        before = self.team.rank * self.args.batch // self.team.size  # films of lower ranks
        pooled = first_films(pooled, self.args.micro, max(0, HEALTH_FILMS - before)).cpu()
        parts = self.team.gather_objects(pooled)
        if not self.team.lead:
            return
        pooled = torch.cat(parts).flatten(0, 1).float().to(self.team.device)
        row = dict.fromkeys(self.names, "")  # some ablated worlds lack some terms
        row |= dict(zip(losses, means.tolist(), strict=True))
        row |= dict(lr=lr, momentum=momentum)
        row |= dict(feature_std=feature_std(pooled), rankme=rankme(pooled))
        row["images_per_s"], seconds = self.log.speed(done)
        row["data_wait"] = self.waited / seconds
        self.waited = 0.0
        steps_per_epoch = self.total // self.args.epochs
        self.log.row(done, epoch=done / steps_per_epoch, **row)
        self.show(done, row)

    def show(self, done, row):
        """Put a row's main numbers behind the progress bar, and warn of a collapse above it."""
        std = row["feature_std"]
        rank = row["rankme"]
        speed = f"{row['images_per_s']:.0f} images/s, waiting {row['data_wait']:.0%}"
        self.bar.set_postfix_str(f"loss {row['loss']:.3f}, RankMe {rank:.1f}, {speed}")
        is_early = done <= self.total / 10  # features are always poor then
        if not is_early and (std < 0.02 or rank < 1.5):
            self.bar.write(
                f"warning: step {done}: the features collapse (std {std:.3f}, RankMe {rank:.1f}): "
                "lower --lr, raise --ema or lengthen --warmup; python -m lab.health tells more"
            )

    def check(self, done, model=None):
        """Raise UserError on every rank when a loss so far, or a weight of `model`, is not finite.

        With `model` before a checkpoint is written, so that last.pt stays good.
        """
        is_broken = self.is_finite.item() == 0
        if model is not None:
            trained = [weight for weight in model.parameters() if weight.requires_grad]
            is_broken = is_broken or not all(torch.isfinite(w).all() for w in trained)
        if self.team.any(is_broken):
            raise UserError(
                f"the loss became NaN or infinite before step {done}: {self.out}/last.pt still "
                "holds the last good state; start again with a lower --lr or --precision float32"
            )


def first_films(pooled, micro: int, count: int):
    """Take the first films of a rank's share of the batch, at most `count`. → (n, 2, D)

    pooled (2b, D): micro-batch after micro-batch, of each view 1 of its `micro` films, then view 2.
    """
    views = pooled.unflatten(0, (-1, 2, micro))  # (micro-batches, 2, micro, D)
    return views.transpose(1, 2).flatten(0, 1)[:count]
