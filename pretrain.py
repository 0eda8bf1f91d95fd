"""Pre-train CheXWorld.

    python pretrain.py                                          # laptop: the demo, synthetic films, five minutes on two CPU cores
    python pretrain.py --data /cxr --size base                  # one GPU: the paper's recipe on any folder of films, or on a packed file
    torchrun --nproc_per_node=8 pretrain.py --data /cxr         # eight GPUs, the same code
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 pretrain.py --data /cxr.pack

The data decides the recipe: none means the demo, given means the paper; flags override both. The same command again goes on
where the last one stopped. --out receives config.json, log.csv, last.pt, encoder.pt, curve.png, views.png and result.json.
"""

import dataclasses
import hashlib
import os
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm

import augment
from data import Batches, InMemory, UnreadableFilms, Views, open_films
from lab.meter import fitting, passes
from lab.report import closing
from masks import mask_sizes, sample_masks
from model import SIZES, CheXWorld
from plumbing import phantom, pictures
from plumbing.checkpoint import Log, StopRequest, remove_leftovers, resume, save_atomic, write_json
from plumbing.keys import torch_generator
from plumbing.launch import (
    UserError,
    autocast,
    choose_precision,
    clip_and_step,
    cosine,
    flag,
    leave_with_parent,
    no_sync,
    parse,
    prepare_forward,
    run_script,
    send,
    start_team,
    warmup_cosine,
)
from plumbing.monitor import LOSSES, collect_health, warn_of_collapse
from plumbing.splits import hold_out_films
from plumbing.table import Labels

RECIPES = {
    "demo": dict(
        size="tiny",
        image=64,
        patch=8,
        batch=16,
        epochs=20,
        warmup=1.0,
        lr=1.2e-3,
        ema=0.99,
        log_every=20,
        save_every=200,
        seed=0,
    ),
    "paper": dict(
        size="base",
        image=224,
        patch=16,
        batch=2048,
        epochs=300,
        warmup=40.0,
        lr=2e-4,
        ema=0.996,
        log_every=20,
        save_every=500,
        seed=0,
    ),
}


FREE = {
    "out",
    "device",
    "workers",
    "micro",
    "max_steps",
    "log_every",
    "save_every",
    "compile",
    "data",
    "probe",
    "patients",
    "checkpointing",
}  # may change on resume


@dataclasses.dataclass
class Config:
    data: str = flag(
        None,
        "folder of films (searched recursively; MIMIC-CXR-JPG, CheXpert, ChestX-ray14 are recognised) or a .pack file; none = the demo",
    )
    out: str = flag(None, "folder of the run [runs/demo, or runs/pretrain with --data]")
    size: str = flag(
        None,
        "network: tiny 128 × 4, small 384 × 12, base 768 × 12 (the paper's), large 1024 × 24",
        list(SIZES),
    )
    image: int = flag(None, "side of the crops, px [demo 64, paper 224]")
    patch: int = flag(None, "side of a patch, px [demo 8, paper 16]")
    batch: int = flag(
        None,
        "films a step over all GPUs; micro-batch × accumulation × GPUs is derived [demo 16, paper 2048]",
    )
    micro: int = flag(
        None,
        "films a forward pass on one GPU [what fills 70 % of its memory by count; at most 64 on a CPU]",
    )
    epochs: int = flag(None, "passes over the films; sets the schedules [demo 20, paper 300]")
    warmup: float = flag(None, "epochs of linear warm-up [demo 1, paper 40]")
    max_steps: int = flag(None, "stop early after this many steps, without changing any schedule")
    lr: float = flag(None, "peak learning rate [demo 1.2e-3, paper 2e-4]")
    min_lr: float = flag(1e-6, "learning rate at the end of the cosine")
    weight_decay: float = flag(0.05, "AdamW weight decay; none on biases, norms and the mask token")
    clip: float = flag(1.0, "largest gradient norm")
    ema: float = flag(
        None, "momentum of the target encoder at the start; 1.0 at the end [demo 0.99, paper 0.996]"
    )
    tasks: str = flag("local,global,domain", "world modelling tasks, any subset (Table 3)")
    no_delta: bool = flag(
        False, "ablation: hide the relative position Δ (the target's own grid instead of φ)"
    )
    no_action: bool = flag(
        False, "ablation: hide the action a from the policy network, augmentation kept"
    )
    not_unified: bool = flag(False, "ablation: a separate forward pass for each task")
    probe: str = flag(
        None,
        "CSV tables filename,label,split joined by commas: linear probes at the end; their test films are left out of training",
    )
    patients: str = flag(
        None, "CSV table filename,patient_id, so that no patient of a held-out film is trained on"
    )
    holdout: int = flag(50, "films held out for the closing domain test when --probe names none")
    phantoms: int = flag(2000, "synthetic films of the demo")
    precision: str = flag(
        "auto",
        "auto = bfloat16 on GPUs and on CPUs that multiply it natively",
        ["auto", "float32", "bfloat16"],
    )
    compile: str = flag("auto", "torch.compile; auto = on GPUs", ["auto", "on", "off"])
    checkpointing: bool = flag(
        False, "recompute activations in the backward pass: less memory, about a third more time"
    )
    seed: int = flag(None, "of everything random [0]")
    device: str = flag("auto", "auto, cpu, cuda or cuda:1")
    workers: int = flag(
        None, "loader processes [8 a GPU; on a CPU 0 when the films fit into memory, else 1]"
    )
    log_every: int = flag(None, "steps between rows of log.csv")
    save_every: int = flag(None, "steps between checkpoints [demo 200, paper 500]")


def choose(config):
    """Fill what the user left open from the recipe of the data. → (Config, name of the recipe)"""
    recipe = "paper" if config.data else "demo"
    for key, value in RECIPES[recipe].items():
        if getattr(config, key) is None:
            setattr(config, key, value)
    config.out = config.out or ("runs/pretrain" if config.data else "runs/demo")
    least = dict.fromkeys(
        (
            "batch",
            "epochs",
            "image",
            "patch",
            "log_every",
            "save_every",
            "micro",
            "max_steps",
            "phantoms",
        ),
        1,
    ) | dict.fromkeys(("workers", "holdout", "warmup"), 0)
    for key, low in least.items():
        if getattr(config, key) is not None and getattr(config, key) < low:
            raise UserError(f"--{key} {getattr(config, key)}: must be at least {low}")
    if config.image % config.patch:
        raise UserError(f"--image {config.image} is not a multiple of --patch {config.patch}")
    if config.image // config.patch < 4:
        raise UserError(
            f"--image {config.image} holds {config.image // config.patch} patches a side: at least 4 are needed for masks"
        )
    if not set(config.tasks.split(",")) <= {"local", "global", "domain"}:
        raise UserError(f"--tasks {config.tasks}: any of local,global,domain, joined by commas")
    return config, recipe


def demo_data(config, team):
    """The demo's films: phantoms written once as PNG files with a CSV, then read by the real loader. → (folder, CSV)"""
    folder = Path(config.out) / "phantoms"
    drawn = (
        sum(1 for _ in open(folder / "phantoms.csv")) - 1
        if (folder / "phantoms.csv").is_file()
        else 0
    )
    if drawn not in (0, config.phantoms):
        raise UserError(
            f"{folder} holds {drawn} phantoms, not {config.phantoms}: choose another --out, or delete the folder"
        )
    if team.lead and not drawn:
        team.say(f"demo: drawing {config.phantoms} synthetic films into {folder}")
        phantom.write_phantoms(
            folder,
            config.phantoms,
            size=max(128, config.image * 3 // 2),
            seed=config.seed,
            workers=os.cpu_count() or 1,
        )
    return folder / "films", folder / "phantoms.csv"


def micro_batch(config, team):
    """Films a forward pass: the largest divisor of this rank's share within the limit. Stop when the share is not whole."""
    if config.batch % team.world:
        raise UserError(f"--batch {config.batch} is not a multiple of the {team.world} processes")
    share = config.batch // team.world
    limit = config.micro or (
        gpu_limit(config, torch.cuda.get_device_properties(team.device).total_memory)
        if team.device.type == "cuda"
        else 64
    )
    return max(m for m in range(1, min(limit, share) + 1) if share % m == 0)


def gpu_limit(config, memory):
    """Films a forward pass that by count fill 70 % of a GPU with so many bytes, given the wanted tasks."""
    grid = config.image // config.patch
    visible, masked = mask_sizes(grid)
    case = SimpleNamespace(**vars(config) | dict(visible=visible, masked=masked, targets=grid**2))
    return fitting(
        case, memory, config.checkpointing, passes(case, config.tasks, not config.not_unified)
    )


def parameter_groups(world, weight_decay):
    """AdamW groups: no decay on biases, norms and the mask token (all of them are vectors)."""
    trained = [p for p in world.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]


def prepare(item, config, step, places, device):
    """A loaded micro-batch → what CheXWorld.forward takes, for both views. All randomness is torch_generator by (seed, step, place in the global batch)."""
    generator, B, grid = (
        torch_generator(4, config.seed, step),
        config.batch,
        config.image // config.patch,
    )
    jitter = augment.sample_jitter(B, generator)[places]  # (b, 2): shared by both views
    both = torch.cat([places, places + B])  # rows of view 1, then of view 2
    action = send(augment.sample_actions(2 * B, generator)[both], device)  # (2b, 4)
    keep, masked = sample_masks(2 * B, grid, generator, both, device)  # (2b, K), (2b, M)
    views = augment.to_float(item["views"].to(device, non_blocking=True))  # (b, 2, H, W)
    y = (
        augment.apply_jitter(views, send(jitter, device)).transpose(0, 1).flatten(0, 1)[:, None]
    )  # (2b, 1, H, W)
    boxes, flips = (
        item[k].to(device, non_blocking=True).transpose(0, 1) for k in ("boxes", "flips")
    )  # (2, b, ·)
    coords = augment.relative_coords(
        boxes.flatten(0, 1),
        boxes.flip(0).flatten(0, 1),
        grid,
        flips.flatten(),
        flips.flip(0).flatten(),
    )
    return dict(
        y=y,
        x=augment.apply_action(y, action),
        keep=keep,
        masked=masked,
        coords=coords,
        action=action,
    )


def recipe_of(config, names):
    """What a run must keep to be continued: every setting that changes the numbers, and the films by name."""
    recipe = {k: v for k, v in dataclasses.asdict(config).items() if k not in FREE}
    return recipe | {
        "films": len(names),
        "names": hashlib.sha256("\n".join(names).encode()).hexdigest()[:16],
    }


def save(out, world, optimizer, recipe, step):
    """last.pt: all that resuming needs; encoder.pt: the target encoder alone. Both atomically."""
    save_atomic(
        {
            "world": world.state_dict(),
            "config": world.config,
            "optimizer": optimizer.state_dict(),
            "recipe": recipe,
            "step": step,
        },
        out / "last.pt",
    )
    encoder = world.target_encoder
    save_atomic(
        {"encoder": encoder.state_dict(), "config": encoder.config, "step": step},
        out / "encoder.pt",
    )


def main(args=None, Model=CheXWorld):
    # config
    config, recipe_name = choose(args or parse(Config, __doc__))
    out = Path(config.out)

    # devices
    team = start_team(config.device)
    device = team.device
    config.precision = choose_precision(config.precision, device)
    torch.manual_seed(config.seed)

    if team.lead:
        remove_leftovers(out)
    team.wait()

    # data
    probes = config.probe.split(",") if config.probe else []
    if recipe_name == "demo":
        config.data, table = demo_data(config, team)
        probes = probes or [table]
        team.wait()  # the others wait for the films
    films = open_films(
        config.data, out, side=round(config.image * 320 / 224), patients=config.patients
    )
    team.say("\n".join(films.summary))
    tables = [Labels(path).complete() for path in probes]
    train, held = hold_out_films(films, tables, config.holdout, config.seed)
    if len(train) < config.batch:
        raise UserError(
            f"{len(train)} films to train on are fewer than one batch: lower --batch {config.batch} or add films"
        )
    memory = len(films) * (config.image * 1.5) ** 2 * 1.3 < 1e9
    workers = (
        config.workers
        if config.workers is not None
        else 8
        if device.type == "cuda"
        else 0
        if memory
        else 1
    )
    films = (
        InMemory(films) if memory and not workers else films
    )  # each worker would keep films of its own
    micro = micro_batch(config, team)
    accumulate = config.batch // team.world // micro
    per_epoch = len(train) // config.batch
    total = config.epochs * per_epoch
    end = min(total, config.max_steps or total)
    views = Views(films, config.image, config.seed, train)
    unreadable = UnreadableFilms(len(films))

    # model
    world = Model(config.image, config.patch, **SIZES[config.size]).to(device)
    world.encoder.save_memory = world.predictor.save_memory = config.checkpointing
    K, M = mask_sizes(world.encoder.grid)
    parameters = [p for p in world.parameters() if p.requires_grad]
    team.say(
        f"{recipe_name} recipe: {config.size} ViT, {sum(p.numel() for p in parameters) / 1e6:.1f} M trained parameters, {config.image}² px in {config.patch}² patches "
        f"({K} visible, {M} masked of {world.encoder.grid**2})\n{len(train)} films to train on, {len(held)} held out; batch {config.batch} = {micro} × {accumulate} accumulated × "
        f"{team.world} process(es); {config.epochs} epochs = {total} steps; {config.precision} on {device}; run in {out}"
    )

    # optimizer
    optimizer = torch.optim.AdamW(
        parameter_groups(world, config.weight_decay), lr=config.lr, betas=(0.9, 0.999), fused=True
    )

    # resume
    recipe = recipe_of(config, [films.names[i] for i in train])
    saved = resume(out / "last.pt", recipe, {"world": world, "optimizer": optimizer})
    start = saved["step"] if saved else 0
    mean_start = team.mean(torch.tensor(float(start), device=device)).item()
    if team.any(mean_start != start):
        raise UserError(
            f"--out {out} must lie on a disk that all nodes share: they do not find the same last.pt there"
        )
    if start:
        team.say(f"going on at step {start} of {total}")
    if team.lead:
        write_json(
            out / "config.json",
            {
                k: str(v) if isinstance(v, Path) else v
                for k, v in dataclasses.asdict(config).items()
            },
        )
        columns = [
            "step",
            "epoch",
            "images",
            "loss",
            *LOSSES,
            "lr",
            "momentum",
            "feature_std",
            "rankme",
            "images_per_s",
            "data_wait",
        ]
        log = Log(out / "log.csv", columns, start)
        if not start:
            pictures.save(draw_views(views, config, min(4, config.batch)), out / "views.png")

    # compile, DDP
    forward = prepare_forward(world, config.compile, team)

    # loop
    batches = Batches(
        len(train), config.batch, micro, team.rank, team.world, config.seed, start, end
    )
    loader = iter(
        torch.utils.data.DataLoader(
            views,
            batch_sampler=batches,
            num_workers=workers,
            pin_memory=device.type == "cuda",
            worker_init_fn=leave_with_parent,
        )
    )
    bar = tqdm(total=end, initial=start, unit="step", disable=not team.lead, smoothing=0.1)
    asked, finite, waited, since, logged, done = (
        StopRequest(),
        torch.ones((), device=device),
        0.0,
        time.perf_counter(),
        start,
        start,
    )
    try:
        for step in range(start, end):
            lr = warmup_cosine(
                step, total, round(config.warmup * per_epoch), config.lr, config.min_lr
            )
            momentum = cosine(step, total, config.ema, 1.0)
            for group in optimizer.param_groups:
                group["lr"] = lr
            terms = []
            features = []
            for part in range(accumulate):
                waiting = time.perf_counter()
                item = next(loader)
                waited += time.perf_counter() - waiting
                unreadable.note_batch(item)
                places = team.rank * micro * accumulate + part * micro + torch.arange(micro)
                batch = prepare(item, config, step, places, device)
                sync = no_sync(forward, is_last=part + 1 == accumulate)
                with sync, autocast(device, config.precision):
                    losses, pooled = forward(**batch)
                    (losses["loss"] / accumulate).backward()
                terms.append(losses)
                features.append(pooled)
            norm = clip_and_step(world, optimizer, config.clip)
            world.update_target(momentum)
            finite = (
                finite
                * torch.isfinite(torch.stack([t["loss"].detach() for t in terms])).all()
                * torch.isfinite(norm)
            )  # on the device until asked
            bar.update()

            done = step + 1
            stopping = team.any(asked.requested)
            saving = done % config.save_every == 0 or done == end or stopping
            if done % config.log_every == 0 or done == end or saving:
                broken = (
                    finite.item() == 0
                    or saving
                    and not all(torch.isfinite(p).all() for p in parameters)
                )
                if team.any(broken):
                    raise UserError(
                        f"the loss became NaN or infinite before step {done}: {out}/last.pt still holds the last good state; start again with a lower --lr or --precision float32"
                    )
            if done % config.log_every == 0 or done == end:
                names = [n for n in LOSSES + ["loss"] if n in terms[0]]
                mean = team.mean(
                    torch.stack([torch.stack([t[n].detach() for t in terms]).mean() for n in names])
                )
                std, rank = collect_health(torch.cat(features), team)
                now = time.perf_counter()
                rate, wait = (done - logged) * config.batch / (now - since), waited / (now - since)
                waited, since, logged = 0.0, now, done
                values = {n: "" for n in LOSSES} | dict(zip(names, mean.tolist()))
                if team.lead:
                    log.row(
                        step=done,
                        epoch=done / per_epoch,
                        images=done * config.batch,
                        lr=lr,
                        momentum=momentum,
                        feature_std=std,
                        rankme=rank,
                        images_per_s=rate,
                        data_wait=wait,
                        **values,
                    )
                    bar.set_postfix_str(
                        f"loss {values['loss']:.3f} rank {rank:.1f} {rate:.0f} images/s wait {wait:.0%}"
                    )
                    warn_of_collapse(std, rank, done, total, bar)
            if saving and team.lead:
                save(out, world, optimizer, recipe, done)
            if stopping:
                break
    finally:
        bar.close()

    if team.lead and not asked.requested:
        closing(config, out, world, films, held, tables, device)
    if asked.requested:
        team.say(f"SIGTERM: saved at step {done} in {out}; the same command goes on from there")
    team.leave()


def batch_of(views, numbers):
    """Items of epoch 0 as one batch, the way the loader stacks them."""
    return torch.utils.data.default_collate([views[0, i] for i in numbers])


def draw_views(views, config, count):
    """The first films as step 0 shows them to the model. → picture"""
    item = batch_of(views, range(count))
    batch = prepare(item, config, 0, torch.arange(count), "cpu")
    films = [views.read(b)[0] for b in range(count)]
    return pictures.views_picture(films, item["boxes"], item["flips"], batch, config.patch)


if __name__ == "__main__":
    run_script(main)
