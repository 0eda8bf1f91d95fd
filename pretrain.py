"""Pre-train CheXWorld on chest films.

    python pretrain.py                                     # laptop: a demo on synthetic films
    python pretrain.py --data /cxr                         # your films, one GPU or a laptop
    torchrun --nproc_per_node=8 pretrain.py --data /cxr    # eight GPUs, the same code
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \\
        pretrain.py --data /cxr.pack                       # four nodes, films packed by data.py
    python pretrain.py --data /cxr --weights FILE          # few films: go on from what exists

Settings that you leave open come from a recipe, a row of the table below: demo without --data,
continue with --weights, else small with fewer than 20,000 films to train on, paper with more;
--recipe names another. The same command again goes on where the last one stopped. The folder --out
receives config.json, log.csv, last.pt, encoder.pt, curve.png, views.png and result.json.
"""

import dataclasses
from pathlib import Path

import torch

import augment
from data import Views, make_loader, open_films
from lab.report import closing
from masks import mask_sizes, sample_asked, sample_masks
from model import SIZES, CheXWorld, swap_views
from plumbing import checkpoint, launch, pictures
from plumbing.keys import STEP, torch_generator
from plumbing.launch import UserError, flag
from plumbing.monitor import Monitor, describe_length, describe_network
from plumbing.own_table import open_tables
from plumbing.pack import UnreadableFilms, hold_in_memory
from plumbing.phantom import draw_demo
from plumbing.splits import hold_out_films
from plumbing.weights import find_origin, start_world

# fmt: off
# For all, a gradient norm of at most 1.0 and a last learning rate of 1e-6: launch.TrainFlags. What
# a row does not name is as in OF_THE_PAPER. The reasons are in docs/method.md.
RECIPES = {
    "demo":  dict(size="tiny", image=96,  patch=16, batch=8,    epochs=34,  warmup=2.7,
                  lr=7.5e-4,   ema=0.9975, save_every=200),
    "small": dict(size="tiny", image=128, patch=16, batch=8,    epochs=120, warmup=9.6,
                  lr=7.5e-4,   ema=0.9975, save_every=200),
    "paper": dict(size="base", image=224, patch=16, batch=2048, epochs=300, warmup=40.0,
                  lr=2e-4,     ema=0.996, save_every=500),  # Sec. B.1
    # With --weights; size, image and patch are the file's.
    "continue": dict(batch=64, epochs=100, warmup=5.0, lr=1e-4, ema=0.998, save_every=200),
}
FEW = 20_000  # films to train on; fewer get the small recipe
# Settings that came later, with the value that does what was done before there was a choice: a run
# that leaves them so goes on, though an earlier version began it.
OF_THE_PAPER = {"pixels": 0.0, "global_share": 1.0}
# Settings that may change when a run goes on: they change no random number and no schedule, though
# another device or micro-batch may round otherwise. The films that were chosen are compared by name
# instead, the file of --weights by its content (recipe_of).
FREE = {"recipe", "data", "out", "weights", "max_steps", "probe", "patients", "device", "workers",
        "micro", "compile", "checkpointing", "log_every", "save_every"}
# fmt: on


@dataclasses.dataclass
class Config(launch.TrainFlags):
    """The flags; None is filled in from the recipe ([recipe] in the help) or where it is used.

    The flags of every training (--micro, --precision ...) are in plumbing/launch.py.
    """

    recipe: str = flag(
        None,
        f"the settings that you leave open [paper; small with fewer than {FEW:,} films to train "
        "on; demo without --data]",
        ["paper", "small", "demo"],
    )
    data: str = flag(
        None,
        "folder of films, searched with all below it (MIMIC-CXR-JPG, CheXpert and ChestX-ray14 "
        "are recognised), or a .pack file; without it: the demo",
    )
    out: str = flag(
        None,
        "folder of the run [runs/demo, runs/pretrain with --data, runs/continue with --weights]",
    )
    weights: str = flag(
        None,
        "start from these weights, not from random ones: of a run (its folder or last.pt), the "
        "authors' file, or an encoder alone, which waits while a new predictor learns",
    )
    size: str = flag(
        None,
        "network, width × depth: tiny 128 × 4, small 384 × 12, base 768 × 12, large 1024 × 24 "
        "[recipe; with --weights that of the file, as --image and --patch]",
        list(SIZES),
    )
    image: int = flag(None, "side of the two crops of a film, px [recipe]")
    patch: int = flag(None, "side of a patch, px; must divide --image [recipe]")
    batch: int = flag(None, "films per step, over all GPUs together [recipe]")
    epochs: int = flag(None, "passes over the films; sets the schedules [recipe]")
    warmup: float = flag(
        None,
        "epochs during which the learning rate rises from 0 [recipe; fewer epochs: the same share]",
    )
    lr: float = flag(None, "peak learning rate [recipe]")
    weight_decay: float = flag(0.05, "AdamW weight decay; none on biases, norms and the mask token")
    ema: float = flag(
        None,
        "momentum with which the target encoder follows the encoder, at the start; it rises to 1 "
        "[recipe]",
    )
    pixels: float = flag(
        None,
        "weight W of a baseline that is not in the paper: loss = (1 - W) · features + W · pixels; "
        "1 predicts nothing but the target's normalised pixels, as MAE does [recipe]",
    )
    global_share: float = flag(
        None,
        "share of the other view's patches that a view predicts, drawn anew at every step; below "
        "1 a step is cheaper; 1 is the paper [recipe]",
    )
    probe: str = flag(
        None,
        "CSV tables filename,label,split joined by commas: a linear probe on each at the end; "
        "their test films are left out of training",
    )
    patients: str = flag(
        None, "CSV table filename,patient_id, so that no patient of a held-out film is trained on"
    )
    holdout: int = flag(50, "without --probe: films held out for the domain test, a tenth at most")
    phantoms: int = flag(2000, "synthetic films of the demo")
    checkpointing: bool = flag(
        False, "recompute activations in the backward pass: less memory, about a third more time"
    )
    seed: int = flag(0, "of everything random")
    log_every: int = flag(20, "steps between rows of log.csv")
    save_every: int = flag(None, "steps between checkpoints [recipe]")


# ---- Settings and films
def folder_of(args):
    """Choose the folder of the run, where --out names none."""
    if args.out is not None:
        return args.out
    if args.weights is not None:
        return "runs/continue"
    return "runs/demo" if args.data is None else "runs/pretrain"


def choose_recipe(args, films):
    """Choose the recipe of a run that trains on so many films. → its name

    A run that was begun goes on with its own recipe, of whatever number of films; before there was
    --recipe that was the paper's.
    """
    if args.weights is not None:
        return "continue"
    if args.recipe is not None:
        return args.recipe
    if args.data is None:
        return "demo"
    out = Path(args.out)
    if (out / "last.pt").is_file():
        begun = checkpoint.read_json(out / "config.json").get("recipe", "paper")
        if begun != "continue":  # without --weights that run cannot go on: it is refused later
            return begun
    return "small" if films < FEW else "paper"


def fill_in(args, name, origin=None):
    """Fill in every setting that the user left open from the recipe `name`. → a new Config

    origin: the weights that --weights starts from, as find_origin read them; size, image and patch
    are then theirs. A run of fewer epochs than the recipe's gets the same share of warm-up, so that
    it comes to its peak and down again. Raises UserError when a setting cannot work.
    """
    recipe = OF_THE_PAPER | RECIPES[name] | (origin.settings() if origin else {})
    recipe["recipe"] = name
    epochs = args.epochs or recipe["epochs"]
    recipe["warmup"] *= min(1, epochs / recipe["epochs"])
    left_open = {key: value for key, value in recipe.items() if getattr(args, key) is None}
    args = dataclasses.replace(args, **left_open)
    if args.warmup >= args.epochs:
        raise UserError(
            f"--warmup {args.warmup:g} must be less than --epochs {args.epochs}: "
            "the learning rate would not come to its peak and down again"
        )
    if args.image % args.patch:
        raise UserError(f"--image {args.image} is not a multiple of --patch {args.patch}")
    grid = args.image // args.patch
    if grid < 4:
        raise UserError(
            f"--image {args.image} is {grid} × {grid} patches: at least 4 × 4 are needed for masks"
        )
    if origin:
        origin.refuse_others(args.size, args.patch, args.pixels)
    return args


def choose_films(args, out, team):
    """Open the films, and divide those to train on from those kept for the closing test.

    → films, the tables of --probe, numbers of the films to train on, and of those held out
    """
    films = open_films(args.data, out, patients=args.patients)
    team.say("\n".join(films.summary))
    tables = open_tables(args.probe, films, team)
    return films, tables, *hold_out_films(films, tables, args.holdout, args.seed)


# ---- One step
def prepare(item, args, step, batch_positions, device):
    """Turn loaded films into what CheXWorld.forward takes.

    item: b films of data.Views, from the loader: views (b, 2, H, W) uint8, boxes (b, 2, 4), flips
    (b, 2). batch_positions (b,): where they stand in the batch of all processes. Random numbers are
    drawn for that whole batch and cut to these positions, so that a film meets the same numbers
    whatever the number of GPUs and the size of the micro-batch.
    """
    grid = args.image // args.patch
    generator = torch_generator(STEP, args.seed, step)
    jitter = augment.sample_jitter(args.batch, generator)[batch_positions]  # (b, 2)
    # From here on a batch has 2b rows: view 1 of all films, then view 2.
    rows = torch.cat([batch_positions, batch_positions + args.batch])  # (2b,)
    action = augment.sample_actions(2 * args.batch, generator)[rows]  # (2b, 4)
    keep, masked = sample_masks(2 * args.batch, grid, generator, rows)  # (2b, K), (2b, M)
    asked = None  # all patches of the other view
    share = args.global_share or 1.0  # lab.views leaves it open
    if share < 1:  # drawn last, so that all other numbers are as without it
        asked = launch.send(sample_asked(2 * args.batch, grid, share, generator, rows), device)

    # Targets y: the two crops, jittered alike: view 1 could not foresee a jitter of view 2 alone.
    views = augment.to_float(item["views"].to(device, non_blocking=True))  # (b, 2, H, W)
    views = augment.apply_jitter(views, launch.send(jitter, device))
    y = view_by_view(views)[:, None]  # (2b, 1, H, W)

    # x = T_a(y), Eq. (9), for the contexts: unlike the jitter, each view's action is its own.
    action = launch.send(action, device)
    x = augment.apply_action(y, action)

    # φ, Eq. (5): where the patches of the *other* view lie in the grid of this one.
    boxes = view_by_view(item["boxes"].to(device, non_blocking=True))  # (2b, 4)
    flips = view_by_view(item["flips"].to(device, non_blocking=True))  # (2b,): is it mirrored?
    coords = augment.relative_coords(boxes, swap_views(boxes), grid, flips, swap_views(flips))
    keep = launch.send(keep, device)
    masked = launch.send(masked, device)
    return dict(y=y, x=x, keep=keep, masked=masked, coords=coords, action=action, asked=asked)


def view_by_view(pairs):
    """Put view 1 of all films before view 2 of all films. (b, 2, ...) → (2b, ...)"""
    return pairs.transpose(0, 1).flatten(0, 1)


def micro_batches(items, args, step, team, unreadable):
    """Yield what this process computes of a step, one prepared micro-batch after the other.

    data.Views puts the next film in the place of one that cannot be read; `unreadable` counts them.
    """
    share = args.batch // team.size
    first = team.rank * share
    for start in range(first, first + share, args.micro):
        item = next(items)
        unreadable.note_batch(item)
        batch_positions = torch.arange(start, start + args.micro)
        yield prepare(item, args, step, batch_positions, team.device)


def train_step(forward, optimizer, batches, args, team):
    """Accumulate the gradients of all micro-batches, clip them, update the weights.

    → losses {name: one value per micro-batch}, the pooled targets (2b, D) of this process, the norm
    of the gradient; all of them stay on the device, so that the host need not wait for it
    """
    accumulate = args.batch // team.size // args.micro
    losses = {}
    pooled = []
    for k, batch in enumerate(batches, 1):
        is_last = k == accumulate
        with launch.average_gradients(forward, now=is_last):
            with launch.autocast(team.device, args.precision):
                terms, pooled_targets = forward(**batch)
            (terms["loss"] / accumulate).backward()
        for name, value in terms.items():
            losses.setdefault(name, []).append(value.detach())
        pooled.append(pooled_targets)
    norm = launch.clip_and_step(forward, optimizer, args.clip)
    losses = {name: torch.stack(values) for name, values in losses.items()}
    return losses, torch.cat(pooled), norm


# ---- The run
def make_world(args, origin, Model):
    """Make the world to be trained: a new Model, or one that starts from an Origin's weights."""
    if origin:
        world = start_world(origin, args.image, args.patch, args.pixels)
    else:
        world = Model(args.image, args.patch, pixels=args.pixels, **SIZES[args.size])
    world.encoder.save_memory = args.checkpointing
    world.predictor.save_memory = args.checkpointing
    return world


def parameter_groups(network, weight_decay):
    """AdamW's two groups: matrices and kernels decay; biases, norms, tokens, positions do not."""
    trained = [p for p in network.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() in (2, 4)], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() not in (2, 4)], "weight_decay": 0.0},
    ]


def make_optimizer(world, args, origin, total):
    """Make AdamW. With --weights a new predictor may learn alone first, so that the encoder begins
    some steps late (docs/method.md); last.pt remembers how many.
    """
    if origin is None:
        groups = parameter_groups(world, args.weight_decay)
    else:
        late = origin.steps_alone(args.image, args.patch, total)
        groups = parameter_groups(world.predictor, args.weight_decay)
        for group in parameter_groups(world.encoder, args.weight_decay):
            groups.append(group | {"late": late})
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.999), fused=True)


def set_learning_rate(optimizer, step, total, warmup_steps, args):
    """Set the learning rates of a step. → the predictor's; without --weights all have the same

    Weights that begin late have the same schedule from there on, and 0 before: AdamW then leaves
    them as they are, though it already averages their gradients.
    """
    for group in optimizer.param_groups:
        late = group.get("late", 0)
        times = (step - late, total - late, warmup_steps)
        group["lr"] = launch.warmup_cosine(*times, args.lr, args.min_lr) if step >= late else 0.0
    return optimizer.param_groups[0]["lr"]


def recipe_of(args, names, origin=None):
    """Name all that must stay when a run goes on: settings that change its numbers, the films, the
    weights that it started from.

    A newer setting counts only where it differs from OF_THE_PAPER, so that older runs go on.
    """
    recipe = {name: value for name, value in vars(args).items() if name not in FREE}
    for name, value in OF_THE_PAPER.items():
        if recipe[name] == value:
            del recipe[name]
    if origin:
        recipe["weights"] = origin.digest
    return recipe | {"films": len(names), "names": checkpoint.digest_of_names(names)}


def save(out, world, optimizer, recipe, step):
    """Write last.pt, all that going on needs, and encoder.pt, the target encoder alone.

    No random state is kept: every draw depends on (seed, step) or (seed, epoch, film) alone. The
    target encoder is what the paper fine-tunes (Sec. B.3).
    """
    last = {
        "world": world.state_dict(),
        "config": world.config,
        "optimizer": optimizer.state_dict(),
        "recipe": recipe,
        "step": step,
    }
    checkpoint.save_atomic(last, out / "last.pt")
    encoder = world.target_encoder
    alone = {"encoder": encoder.state_dict(), "config": encoder.config, "step": step}
    checkpoint.save_atomic(alone, out / "encoder.pt")


def draw_views(views, args, count):
    """Draw the first films of the list, changed by the random numbers of step 0. → picture"""
    epoch = 0
    item = torch.utils.data.default_collate([views[epoch, i] for i in range(count)])
    batch = prepare(item, args, 0, torch.arange(count), "cpu")
    films = [views.read(i)[0] for i in range(count)]
    return pictures.views_picture(films, item["boxes"], item["flips"], batch, args.patch)


def main(args=None, Model=CheXWorld):
    """Pre-train one world model.

    args: a Config, by default the command line. Model: what builds the world; lab/ablation.py
    passes its own.
    """
    # ---- 1. Settings: what the user gave; the number of films may decide what is left open.
    table = launch.table_of_recipes(RECIPES, OF_THE_PAPER)
    given = args or launch.parse(Config, f"{__doc__}\n{table}")
    given = dataclasses.replace(given, out=folder_of(given))
    origin = find_origin(given.weights, given.out, given.recipe)
    out = Path(given.out)

    # ---- 2. Processes: torchrun starts one per GPU; without it this is the only one.
    team = launch.start_team(given.device)
    torch.manual_seed(given.seed)  # for the first weights; every other draw has a key of its own
    if team.lead:
        checkpoint.lock(out)  # refuses to start beside another run in the same folder
    team.wait()

    # ---- 3. Films: those to train on, and those kept for the closing test.
    if given.data is None:  # the demo draws a folder of films, as large as its recipe wants them
        name = choose_recipe(given, given.phantoms)
        given = draw_demo(given, fill_in(given, name, origin).image, team)
        given = dataclasses.replace(given, recipe=name)  # else section 4 would see a small set
    films, tables, train, held = choose_films(given, out, team)

    # ---- 4. The recipe fills in what is left open.
    name = choose_recipe(given, len(train))
    team.say(f"recipe: {name}, for {len(train):,} films to train on; --help shows all recipes")
    args = launch.fit_to_machine(fill_in(given, name, origin), team)
    films.side = round(args.image * 320 / 224)  # a short side of 320 px for crops of 224
    films, workers = hold_in_memory(films, args.workers, team.device)
    views = Views(films, args.image, args.seed, train)
    unreadable = UnreadableFilms(len(train))  # ends the run at more than 1 % of the films

    # ---- 5. Length: a step is one batch; --max_steps ends the training, not the schedules.
    steps_per_epoch = len(train) // args.batch
    total = args.epochs * steps_per_epoch
    end = min(total, args.max_steps or total)
    warmup_steps = round(args.warmup * steps_per_epoch)

    # ---- 6. Model and optimizer.
    world = make_world(args, origin, Model).to(team.device)
    optimizer = make_optimizer(world, args, origin, total)
    if origin:
        team.say(origin.describe(args.image, args.patch, total))
    team.say(describe_network(args, world, *mask_sizes(world.encoder.grid), team))
    team.say(describe_length(given, args, RECIPES[name], films, train, held, total, team))

    # ---- 7. Go on where an earlier run in the same folder stopped.
    recipe = recipe_of(args, [films.names[i] for i in train], origin)
    start = checkpoint.resume_run(out, recipe, {"world": world, "optimizer": optimizer}, team)
    loader = make_loader(views, args, team, workers, args.seed, start, end)
    if start:
        team.say(f"going on at step {start} of {total}")
    elif team.lead:
        pictures.save_or_warn(draw_views(views, args, min(4, args.batch)), out / "views.png")
    if team.lead:
        checkpoint.write_json(out / "config.json", dataclasses.asdict(args))

    # ---- 8. Train.
    forward = launch.prepare_forward(world, args.compile, team, total)  # compiled, and in DDP
    is_stopping = False
    monitor = Monitor(out, world.loss_names, args, team, start, end, total)
    with checkpoint.StopRequest() as stop, monitor:  # `stop` notes SIGTERM and Ctrl-C
        items = monitor.timed(loader)  # an iterator; notes how long the training waits for it
        for step in range(start, end):
            lr = set_learning_rate(optimizer, step, total, warmup_steps, args)
            momentum = launch.cosine(step, total, args.ema, 1.0)
            batches = micro_batches(items, args, step, team, unreadable)
            losses, pooled, norm = train_step(forward, optimizer, batches, args, team)
            world.update_target(momentum)
            done = step + 1
            monitor.update(done, losses, pooled, norm, lr, momentum)
            is_stopping = team.any(stop.requested)  # agreed by the CPUs: no wait for the GPU
            if is_stopping or done == end or done % args.save_every == 0:
                monitor.check(done, world)  # stops here rather than save NaN
                if team.lead:
                    save(out, world, optimizer, recipe, done)
                team.wait()
            if is_stopping:
                break
    if is_stopping:
        stop.end(team, f"step {done} in {out}")  # the script ends here

    # ---- 9. Judge the model on the films held out.
    if team.lead:
        closing(args, out, world, films, held, tables)
    team.leave()


if __name__ == "__main__":
    launch.run_script(main)
