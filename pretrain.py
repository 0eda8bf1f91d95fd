"""Pre-train CheXWorld on chest films.

    python pretrain.py                                     # laptop: a demo on synthetic films
    python pretrain.py --data /cxr                         # your films, one GPU or a laptop
    torchrun --nproc_per_node=8 pretrain.py --data /cxr    # eight GPUs, the same code
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \\
        pretrain.py --data /cxr.pack                       # four nodes, films packed by data.py
    python pretrain.py --data /cxr --weights FILE          # few films: continue from these weights

Settings that you leave open come from a recipe, a row of the table below: continue with --weights,
else demo without --data, else small with fewer than 20,000 films to train on, else paper. --recipe
chooses one of the last three itself. The folder --out receives config.json, log.csv, last.pt,
encoder.pt, curve.png, views.png and result.json.

Random numbers depend on the seed and on a step, or on an epoch and film, never on the process. Each
process draws those of a step for the whole batch and keeps its own films' rows. Gradients are
averaged over all. So the number of GPUs, the micro-batch or an interruption changes results by
rounding only. Ctrl-C finishes the step, saves and ends; the same command resumes. A second ends at
once.
"""

import contextlib
import dataclasses
from pathlib import Path

import torch

import augment
from data import Views, make_loader, open_films
from lab.report import judge_on_held_out
from masks import mask_sizes, sample_asked, sample_masks
from model import SIZES, CheXWorld, swap_views
from plumbing import checkpoint, launch, pictures
from plumbing.keys import STEP, torch_generator
from plumbing.launch import UserError, flag
from plumbing.monitor import Monitor, describe_length, describe_network
from plumbing.own_table import open_tables
from plumbing.pack import UnreadableFilms, choose_loading
from plumbing.phantom import draw_demo
from plumbing.splits import hold_out_films
from plumbing.weights import find_origin, start_world

# fmt: off
# All share --clip 1.0 and --min_lr 1e-6 (launch.TrainFlags). What a row does not name has its value
# in NEWER_DEFAULTS. The reasons are in docs/method.md.
RECIPES = {
    "demo":  dict(size="tiny", image=96,  patch=16, batch=8,    epochs=34,  warmup=2.7,
                  lr=7.5e-4,   ema=0.9975, save_every=200),
    "small": dict(size="tiny", image=128, patch=16, batch=8,    epochs=120, warmup=9.6,
                  lr=7.5e-4,   ema=0.9975, save_every=200),
    "paper": dict(size="base", image=224, patch=16, batch=2048, epochs=300, warmup=40.0,
                  lr=2e-4,     ema=0.996, save_every=500),  # Sec. B.1
    # Used with --weights, whose file sets size, image and patch.
    "continue": dict(batch=64, epochs=100, warmup=5.0, lr=1e-4, ema=0.998, save_every=200),
}
FEW = 20_000  # films to train on; fewer get the small recipe
# Newer settings, with the value that means "as in the paper". Runs that began before these flags
# existed can so be resumed.
NEWER_DEFAULTS = {"pixels": 0.0, "global_share": 1.0}
# Flags that may differ when a run resumes: they change its numbers by rounding at most. The films
# are compared by name instead, and the file of --weights by its content (fingerprint_of).
MAY_CHANGE = {"recipe", "data", "out", "weights", "max_steps", "probe", "patients", "device",
              "workers", "micro", "compile", "checkpointing", "log_every", "save_every"}
# fmt: on


@dataclasses.dataclass
class Config(launch.TrainFlags):
    """The flags, with those of launch.TrainFlags. One left at None comes from the recipe ([recipe]
    in the help) or is set later.
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
        "authors' file, or an encoder alone (frozen until a new predictor has learnt)",
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
        "epochs during which the learning rate rises from 0 [recipe, shortened with --epochs]",
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
    holdout: int = flag(50, "without --probe: films to keep for the closing test, a tenth at most")
    phantoms: int = flag(2000, "synthetic films of the demo")
    checkpointing: bool = flag(
        False, "recompute activations in the backward pass: less memory, about a third more time"
    )
    seed: int = flag(0, "seed of all random numbers")
    log_every: int = flag(20, "steps between rows of log.csv")
    save_every: int = flag(None, "steps between checkpoints [recipe]")


# ---- Settings and films
def folder_of(args):
    """Choose the folder of the run. UserError when it holds results of another program."""
    out = "runs/demo" if args.data is None else "runs/pretrain"
    if args.weights is not None:
        out = "runs/continue"
    if args.out is not None:
        out = args.out
    checkpoint.refuse_other_program(out, checkpoint.TRAINING)
    return out


def choose_recipe(args, film_count):
    """Choose the recipe of a run that trains on so many films. → its name

    A run that was begun keeps its recipe, whatever the number of films. Runs older than --recipe
    used the paper's.
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
        if begun != "continue":  # such a run needs --weights: resume_run refuses it
            return begun
    return "small" if film_count < FEW else "paper"


def fill_in(args, name, origin=None):
    """Fill in every setting that the user left open from the recipe `name`. → a new Config

    origin: the weights of --weights, as find_origin read them; they set size, image and patch. With
    fewer epochs than the recipe's, warm-up keeps its share of them, so that the learning rate
    reaches its peak and falls again. Raises UserError when a setting cannot work.
    """
    settings = NEWER_DEFAULTS | RECIPES[name] | (origin.settings() if origin else {})
    settings["recipe"] = name
    epochs = args.epochs or settings["epochs"]
    settings["warmup"] *= min(1, epochs / settings["epochs"])
    left_open = {key: value for key, value in settings.items() if getattr(args, key) is None}
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
        origin.refuse_contradicting(args.size, args.patch, args.pixels)
    return args


def open_and_hold_out(args, out, team):
    """Open the films, and separate those to train on from those kept for the closing test.

    → films, the tables of --probe, indices of the films to train on, and of those held out
    """
    films = open_films(args.data, out, patients=args.patients)
    team.say("\n".join(films.summary))
    tables = open_tables(args.probe, films, team)
    train_indices, held_indices = hold_out_films(films, tables, args.holdout, args.seed)
    return films, tables, train_indices, held_indices


# ---- One step
def prepare(loaded, args, step, batch_positions, device):
    """Turn loaded films into what CheXWorld.forward takes.

    loaded: b films of data.Views, from the loader: views (b, 2, H, W) uint8, boxes (b, 2, 4), flips
    (b, 2). batch_positions (b,): their positions in the batch of all processes. Random numbers are
    drawn for that whole batch and cut to these positions.
    """
    grid = args.image // args.patch
    generator = torch_generator(STEP, args.seed, step)
    jitter = augment.sample_jitter(args.batch, generator)[batch_positions]  # (b, 2)
    # From here on a batch has 2b rows: view 1 of all films, then view 2. view_positions (2b,) says
    # where these rows stand among the 2 · args.batch rows of all processes.
    view_positions = torch.cat([batch_positions, batch_positions + args.batch])
    action = augment.sample_actions(2 * args.batch, generator)[view_positions]  # (2b, 4)
    keep, masked = sample_masks(2 * args.batch, grid, generator, view_positions)  # (2b, K), (2b, M)
    asked = None  # all patches of the other view
    if args.global_share < 1:  # drawn last, so that all other numbers are as without it
        asked = sample_asked(2 * args.batch, grid, args.global_share, generator, view_positions)
        asked = launch.send(asked, device)
    drawn = (jitter, action, keep, masked)
    jitter, action, keep, masked = (launch.send(numbers, device) for numbers in drawn)

    # Targets y: the crops, both with the same jitter. Were view 2 jittered by itself, its exposure
    # could not be predicted from view 1, as nobody tells the model the jitter.
    views = augment.to_float(loaded["views"].to(device, non_blocking=True))  # (b, 2, H, W)
    y = view_by_view(augment.apply_jitter(views, jitter))[:, None]  # (2b, 1, H, W)
    # Copies x = T_a(y); with `keep` they make the contexts of Eq. (9), cut out by the encoder. They
    # keep the jitter, and each view has an action of its own.
    x = augment.apply_action(y, action)
    # φ, Eq. (5): where the patches of the *other* view lie in the grid of this one.
    boxes = view_by_view(loaded["boxes"].to(device, non_blocking=True))  # (2b, 4)
    flips = view_by_view(loaded["flips"].to(device, non_blocking=True))  # (2b,): is it mirrored?
    context = dict(context_box=boxes, context_flip=flips)
    target = dict(target_box=swap_views(boxes), target_flip=swap_views(flips))
    coords = augment.relative_coords(grid=grid, **context, **target)
    return dict(y=y, x=x, keep=keep, masked=masked, coords=coords, action=action, asked=asked)


def view_by_view(pairs):
    """Put view 1 of all films before view 2 of all films. (b, 2, ...) → (2b, ...)"""
    return pairs.transpose(0, 1).flatten(0, 1)


def micro_batches(items, args, step, team, unreadable):
    """Yield this process's micro-batches of a step, each prepared for CheXWorld.forward.

    data.Views puts the next film in the place of one that cannot be read; `unreadable` counts them.
    """
    share = args.batch // team.size
    first = team.rank * share
    for start in range(first, first + share, args.micro):
        loaded = next(items)
        unreadable.note_batch(loaded)
        batch_positions = torch.arange(start, start + args.micro)
        yield prepare(loaded, args, step, batch_positions, team.device)


def train_step(forward, optimizer, batches, args, team):
    """Accumulate the gradients of all micro-batches, clip them, update the weights.

    → losses {name: one value per micro-batch}, the pooled targets (2b, D) of this process, the norm
    of the gradient. All stay on the device, so that the host need not wait for it.
    """
    micro_batch_count = args.batch // team.size // args.micro
    losses = {}
    pooled = []
    for k, batch in enumerate(batches, 1):
        is_last = k == micro_batch_count
        with launch.averaging_gradients(forward, only_if=is_last):
            with launch.autocast(team.device, args.precision):
                batch_losses, pooled_targets = forward(**batch)
            (batch_losses["loss"] / micro_batch_count).backward()
        for name, value in batch_losses.items():
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
    """Make AdamW. With --weights and a new predictor, the encoder's learning rate stays 0 for the
    first steps (docs/method.md); `late` says how many, and last.pt keeps it.
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

    Parameters with `late` start their schedule that many steps later. Until then their learning
    rate is 0: they stay put while AdamW collects the averages of their gradients.
    """
    for group in optimizer.param_groups:
        delay = group.get("late", 0)
        schedule = (step - delay, total - delay, warmup_steps, args.lr, args.min_lr)
        group["lr"] = launch.warmup_cosine(*schedule) if step >= delay else 0.0
    return optimizer.param_groups[0]["lr"]


def fingerprint_of(args, names, origin=None):
    """Collect what must be equal when a run resumes: settings that change its numbers, the films,
    the weights that it started from.

    A newer setting counts only where it differs from NEWER_DEFAULTS, so that older runs resume.
    """
    fingerprint = {name: value for name, value in vars(args).items() if name not in MAY_CHANGE}
    for name, value in NEWER_DEFAULTS.items():
        if fingerprint[name] == value:
            del fingerprint[name]
    if origin:
        fingerprint["weights"] = origin.digest
    return fingerprint | {"films": len(names), "names": checkpoint.digest_of_names(names)}


def save(out, world, optimizer, fingerprint, step):
    """Write last.pt, all that resuming needs, and encoder.pt.

    The paper fine-tunes the target encoder (Sec. B.3). Random numbers need no saved state.
    """
    last = {
        "world": world.state_dict(),
        "config": world.config,
        "optimizer": optimizer.state_dict(),
        "recipe": fingerprint,  # the key's name is from older runs
        "step": step,
    }
    checkpoint.save_atomic(last, out / "last.pt")
    save_encoder(out, world, step)


def save_encoder(out, world, step):
    """Write encoder.pt, the target encoder alone."""
    encoder = world.target_encoder
    alone = {"encoder": encoder.state_dict(), "config": encoder.config, "step": step}
    checkpoint.save_atomic(alone, out / "encoder.pt")


def resume(out, world, optimizer, fingerprint, total, team):
    """Load last.pt, where an earlier run in the same folder stopped. → steps done before"""
    parts = {"world": world, "optimizer": optimizer}
    start = checkpoint.resume_run(out, fingerprint, parts, team)
    if start:
        team.say(f"resuming at step {start} of {total}")
    if start and team.lead:
        renew_encoder(out, world, start)
    return start


def renew_encoder(out, world, step):
    """Write encoder.pt unless it is of this step: a kill may have come between the two files."""
    written = {}
    with contextlib.suppress(UserError):  # there is none, or a damaged one
        written = checkpoint.load_checkpoint(out / "encoder.pt", mmap=True)
    if written.get("step") != step:
        save_encoder(out, world, step)


def draw_views(views, args, count):
    """Draw the first films of the list, changed by the random numbers of step 0. → picture"""
    epoch = 0
    loaded = torch.utils.data.default_collate([views[epoch, i] for i in range(count)])
    batch = prepare(loaded, args, 0, torch.arange(count), "cpu")
    films = [views.read(i)[0] for i in range(count)]
    return pictures.views_picture(films, loaded["boxes"], loaded["flips"], batch, args.patch)


def main(args=None, Model=CheXWorld):
    """Pre-train one world model. args: a Config, by default the command line. Model: what builds
    the world; lab/ablation.py passes its own.
    """
    # ---- 1. Settings: what the user gave; the number of films may decide what is left open.
    help_text = f"{__doc__}\n{launch.table_of_recipes(RECIPES, NEWER_DEFAULTS)}"
    given = args or launch.parse(Config, help_text)
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
        given = dataclasses.replace(given, recipe=name)  # it has --data now, but stays the demo
    films, tables, train_indices, held_indices = open_and_hold_out(given, out, team)

    # ---- 4. The recipe fills in what is left open.
    film_count = len(train_indices)
    name = choose_recipe(given, film_count)
    team.say(f"recipe: {name}, for {film_count:,} films to train on; --help shows all recipes")
    args = launch.fit_to_machine(fill_in(given, name, origin), team)
    films.side = round(args.image * 320 / 224)  # a short side of 320 px for crops of 224
    films, workers = choose_loading(films, args.workers, team.device)
    views = Views(films, args.image, args.seed, train_indices)
    unreadable = UnreadableFilms(film_count)  # ends the run at more than 1 % of the films

    # ---- 5. Length: a step is one batch; --max_steps ends the training, not the schedules.
    steps_per_epoch = film_count // args.batch
    total = args.epochs * steps_per_epoch
    end = min(total, args.max_steps or total)
    warmup_steps = round(args.warmup * steps_per_epoch)

    # ---- 6. Model and optimizer.
    world = make_world(args, origin, Model).to(team.device)
    optimizer = make_optimizer(world, args, origin, total)
    if origin:
        team.say(origin.describe(args.image, args.patch, total))
    team.say(describe_network(args, world, *mask_sizes(world.encoder.grid), team))
    indices = (train_indices, held_indices)
    team.say(describe_length(given, args, RECIPES[name], films, *indices, total, team))

    # ---- 7. Resume where an earlier run in the same folder stopped.
    fingerprint = fingerprint_of(args, [films.names[i] for i in train_indices], origin)
    start = resume(out, world, optimizer, fingerprint, total, team)
    loader = make_loader(views, args, team, workers, args.seed, start, end)
    if team.lead and not start:
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
                    save(out, world, optimizer, fingerprint, done)
                team.wait()
            if is_stopping:
                break
    if is_stopping:
        stop.end(team, f"step {done} in {out}")  # the script ends here

    # ---- 9. Judge the model on the films held out.
    if team.lead:
        judge_on_held_out(args, out, world, films, held_indices, tables)
        if end < total:
            print(f"CUT at step {end:,} of {total:,}: these numbers are of an unfinished training")
    team.leave()


if __name__ == "__main__":
    launch.run_script(main)
