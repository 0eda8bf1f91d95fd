"""How fast does this machine pre-train, and what does each optimisation bring?

    python -m lab.bench                     # every optimisation, off and on: a few minutes
    python -m lab.bench step --size base    # films/s, memory, share of the matmul peak
    python -m lab.bench step --batch 8 --visible 40 --masked 82 --targets 82
    torchrun --nproc_per_node=2 -m lab.bench step --size tiny --image 64 --patch 8 --batch 32

Off and on take turns, so that another load on the machine slows both; every figure is a median.
The films are made up: nothing is downloaded. The tables go to the screen, nothing is kept.
"""

import dataclasses
import functools
import itertools
import os
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import augment
from data import Views, open_films
from masks import mask_sizes, sample_masks
from model import SIZES, CheXWorld, ViT, attend, take
from plumbing import phantom
from plumbing.film import fit, read_film
from plumbing.launch import (
    Team,
    UserError,
    autocast,
    choose_precision,
    clip_and_step,
    flag,
    parse,
    prepare_forward,
    run_script,
    start_team,
)
from plumbing.pack import pack_films

CPU = torch.device("cpu")


@dataclasses.dataclass
class Config:
    size: str = flag("base", "network", list(SIZES))
    image: int = flag(224, "side of the crops, px")
    patch: int = flag(16, "side of a patch, px")
    batch: int = flag(None, "films per step and process [2 on a CPU, 64 on a GPU]")
    visible: int = flag(None, "patches of a view that are kept as its context [80 of 196]")
    masked: int = flag(None, "patches of a view that the local task predicts [92 of 196]")
    targets: int = flag(None, "patches of the other view that the global task predicts [all]")
    precision: str = flag("auto", "as in pretrain.py", ["auto", "float32", "bfloat16"])
    compile: str = flag("auto", "torch.compile the step; auto = on GPUs", ["auto", "on", "off"])
    checkpointing: bool = flag(False, "recompute activations in the backward pass")
    device: str = flag("auto", "auto, cpu, cuda")
    steps: int = flag(5, "steps to time")


def fill_in(config: Config, team: Team) -> Config:
    """Fill in every setting that the user left open. → a new Config

    Raises UserError when the flags ask for more patches than a view has.
    """
    is_gpu = team.device.type == "cuda"
    patches = (config.image // config.patch) ** 2
    visible, masked = mask_sizes(config.image // config.patch)
    config = dataclasses.replace(
        config,
        batch=config.batch or (64 if is_gpu else 2),
        precision=choose_precision(config.precision, team.device),
        visible=config.visible or visible,
        masked=config.masked or masked,
        targets=config.targets or patches,
    )
    if config.visible + config.masked > patches:
        asked = f"--visible + --masked {config.visible + config.masked}"
        raise UserError(f"{asked}: a view has only {patches} patches")
    if config.targets > patches:
        raise UserError(f"--targets {config.targets}: a view has only {patches} patches")
    return config


# ---------------------------------------------------------------- measuring
def timed(function, device):
    """Seconds of one call, the GPU's work included."""
    hardware = torch.get_device_module(device)
    hardware.synchronize()
    began = time.perf_counter()
    function()
    hardware.synchronize()
    return time.perf_counter() - began


def pair(off, on, device, seconds=3.0):
    """Median seconds of two functions that are called in turn. → (off, on)

    After a warm-up they run for about `seconds` together, at least 3, at most 200 times each.
    """
    warm_up = timed(off, device) + timed(on, device)
    end = time.perf_counter() + seconds + warm_up
    times = []
    while len(times) < 3 or (time.perf_counter() < end and len(times) < 200):
        times.append((timed(off, device), timed(on, device)))
    return tuple(np.median(times, axis=0).tolist())


def matmul_peak(device, precision):
    """FLOP/s of the best of five large matrix products: the limit of this machine, now."""
    n = 8192 if device.type == "cuda" else 3072
    a, b = torch.randn(2, n, n, device=device).to(getattr(torch, precision))
    return 2 * n**3 / min(timed(lambda: a @ b, device) for _ in range(5))


def peak_memory(function, device):
    """Most bytes alive at once during a call, above what was there before."""
    function()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as told:
        function()
    events = [e for e in told.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = sorted((e.start_ns(), e.nbytes()) for e in events)
    return max(itertools.accumulate((size for _, size in changes), initial=0))


def count_waits(function, device):
    """How often a call makes the host wait for the device. On a CPU: operations that would."""
    function()
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            function()
        torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(w.message) for w in warned)
    with profile(activities=[ProfilerActivity.CPU]) as told:
        function()
    waiting = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select")
    # AdamW's fused kernel for CPUs reads its step counts, the one for GPUs does not.
    return sum(e.name in waiting and not is_within(e, "aten::_fused_adamw_") for e in told.events())


def is_within(event, name):
    """Whether a profiler event happened inside another one called `name`."""
    while event and event.name != name:
        event = event.cpu_parent
    return event is not None


# ---------------------------------------------------------------- the training step
def made_up_batch(config, device):
    """What CheXWorld.forward takes, with the wanted token counts, from noise. → dict of tensors"""
    generator = torch.Generator().manual_seed(0)
    B = config.batch
    grid = config.image // config.patch
    action = augment.sample_actions(2 * B, generator).to(device)
    y = torch.rand(2 * B, 1, config.image, config.image, generator=generator).to(device)
    order = torch.rand(2 * B, grid**2, generator=generator).argsort(1).to(device)
    two_boxes = [[0.0, 0.0, 300.0, 300.0], [20.0, 40.0, 300.0, 300.0]]
    boxes = torch.tensor(two_boxes, device=device).repeat_interleave(B, 0)  # (2B, 4)
    return dict(
        y=y,
        x=augment.apply_action(y, action),
        keep=order[:, : config.visible],
        masked=order[:, config.visible : config.visible + config.masked],
        coords=augment.relative_coords(boxes, boxes.roll(B, 0), grid),
        action=action,
        asked=None if config.targets == grid**2 else order[:, : config.targets],
    )


class Step:
    """pretrain.py's step on a made-up batch: forward, backward, clip, AdamW, moving average.

    step() → the losses, still on the device. more: settings that differ from the config's.
    """

    def __init__(self, config, team, **more):
        torch.manual_seed(0)
        self.config = dataclasses.replace(config, **more)
        self.device = team.device
        self.world = CheXWorld(config.image, config.patch, **SIZES[config.size]).to(team.device)
        self.world.encoder.save_memory = self.config.checkpointing
        self.world.predictor.save_memory = self.config.checkpointing
        self.trained = [p for p in self.world.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, weight_decay=0.05, fused=True)
        self.forward = prepare_forward(self.world, self.config.compile, team)
        self.batch = made_up_batch(config, team.device)

    def __call__(self):
        with autocast(self.device, self.config.precision):
            losses, _ = self.forward(**self.batch)
        losses["loss"].backward()
        clip_and_step(self.world, self.optimizer, 1.0)
        self.world.update_target(0.996)
        return losses


def count_flops(config):
    """FLOPs of the matrix products of one film's share of a step, as PyTorch counts them.

    What checkpointing computes again does not count.
    """
    one_film = dataclasses.replace(config, batch=1)
    step = Step(one_film, Team(0, 1, CPU), compile="off", checkpointing=False)
    # Fused attention is not counted on CPUs.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        step.forward(**step.batch)[0]["loss"].backward()
    return counter.get_total_flops()


def time_step(config, team):
    """Time the training step; print token counts, films/s, GFLOP per film, share of the peak."""
    peak = matmul_peak(team.device, config.precision)
    step = Step(config, team)
    first = timed(step, team.device)
    step()
    seconds = statistics.median(timed(step, team.device) for _ in range(config.steps))
    team.wait()
    flops = count_flops(config)  # per film
    rate = config.batch / seconds * flops
    held = sum(p.nbytes for p in step.world.parameters())
    held += sum(2 * p.nbytes for p in step.trained)  # the optimizer's two moments
    memory = peak_memory(step, team.device) + held
    team.say(
        f"{config.size} ViT, {config.image}² px in {config.patch}² patches, "
        f"{config.batch} films × {team.size} process(es), two views each; "
        f"{config.visible} kept, {config.masked} masked, {config.targets} global targets "
        f"of {(config.image // config.patch) ** 2}; "
        f"{config.precision} on {team.device}, {torch.get_num_threads()} threads\n"
        f"{config.batch * team.size / seconds:.3f} films/s, {1e3 * seconds:.1f} ms per step "
        f"(the first {first:.1f} s), peak memory {memory / 1e9:.2f} GB, "
        f"of which weights and moments {held / 1e9:.2f} GB\n"
        f"{flops / 1e9:.2f} GFLOP per film: {rate / 1e9:.1f} GFLOP/s, "
        f"{rate / peak:.1%} of the matmul peak {peak / 1e9:.1f} GFLOP/s"
    )


# ---------------------------------------------------------------- the table
@dataclasses.dataclass
class Bench:
    """What every row needs: the filled-in flags, the process, and a folder for its files."""

    config: Config
    team: Team
    folder: Path

    def __post_init__(self):
        self.device = self.team.device
        self.is_gpu = self.device.type == "cuda"

    def row(self, name, off, on, unit, limit=""):
        """Print one row; the gain is a ratio of rates, or of times or bytes the other way round."""
        old, new = (off, on) if unit.endswith("/s") else (on, off)
        gain = new / old if old else float("inf")
        figures = f"{off:9.4g} | {on:9.4g} | {unit:9s} | {gain:6.2f} ×"
        print(f"| {name:58s} | {figures} | {limit:48s} |", flush=True)

    def time_row(self, name, off, on, limit=""):
        """Time two functions in turn and print their row in milliseconds."""
        slow, fast = pair(off, on, self.device)
        self.row(name, 1e3 * slow, 1e3 * fast, "ms", limit)


def table(config, team):
    """Print every optimisation, off and on."""
    single = matmul_peak(team.device, "float32") / 1e12
    half = matmul_peak(team.device, "bfloat16") / 1e12
    print(
        f"{team.device}, {torch.get_num_threads()} threads, torch {torch.__version__}: matmul "
        f"peak {single:.3f} TFLOP/s in float32, {half:.3f} in bfloat16: {half / single:.2f} ×"
    )
    titles = f"{'optimisation':58s} | {'off':>9s} | {'on':>9s} | {'unit':9s} | {'gain':>8s}"
    print(f"\n| {titles} | {'limit':48s} |\n|{'---|' * 6}")
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        bench = Bench(config, team, Path(folder))
        for rows in (*NETWORK_ROWS, *FILM_ROWS):
            rows(bench)


# ---------------------------------------------------------------- rows: networks
def encoder_rows(bench):
    """Both views in one call of the context encoder; patches not kept dropped before it."""
    torch.manual_seed(0)
    config = bench.config
    shape = SIZES[config.size]
    vit = ViT(config.image, config.patch, shape["dim"], shape["depth"], shape["heads"])
    vit.to(bench.device)
    batch = made_up_batch(config, bench.device)
    x = batch["x"]  # (2B, 1, H, W)
    keep = batch["keep"]  # (2B, K)

    def encode(drop=True, calls=1):
        with autocast(bench.device, config.precision):
            for images, kept in zip(x.chunk(calls), keep.chunk(calls), strict=True):
                tokens = vit(images, kept) if drop else take(vit(images), kept)
                tokens.float().square().mean().backward()

    name = "both views in one encoder call, both passes"
    bench.time_row(name, lambda: encode(calls=2), encode, "1 × where one view fills the machine")
    limit = f"{vit.grid**2 / config.visible:.2f} × = all patches / kept ones"
    name = "patches not kept dropped: context encoder, both passes"
    bench.time_row(name, lambda: encode(drop=False), encode, limit)


def attention_rows(bench):
    """model.attend against the way it does not take, on the shape of the target encoder."""
    config = bench.config
    shape = SIZES[config.size]
    tokens = (config.image // config.patch) ** 2
    size = (2 * config.batch, shape["heads"], tokens, shape["dim"] // shape["heads"])

    def plain(q, k, v):
        return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v

    def both_passes(attention, qkv):
        attention(*qkv).sum().backward()

    for precision in dict.fromkeys(("float32", config.precision)):
        options = dict(device=bench.device, dtype=getattr(torch, precision), requires_grad=True)
        qkv = [torch.randn(size, **options) for _ in range(3)]
        is_fused = bench.is_gpu or precision == "float32"  # as model.attend decides
        other = plain if is_fused else F.scaled_dot_product_attention
        way = "plain → fused" if is_fused else "fused → plain"
        ways = [functools.partial(both_passes, attention, qkv) for attention in (other, attend)]
        bench.time_row(f"attention in {precision}, both passes: {way}", *ways)


def step_row(bench, name, config, off, on):
    """The step in two settings, which differ from the config's as `off` and `on` say."""
    slow = Step(config, bench.team, **off)
    fast = Step(config, bench.team, **on)
    limit = f"first step on: {timed(fast, bench.device):.1f} s"  # compiling is part of it
    off_seconds, on_seconds = pair(slow, fast, bench.device)
    rates = (config.batch / off_seconds, config.batch / on_seconds)
    bench.row(f"{name}: {config.size} step", *rates, "films/s", limit)


def setting_rows(bench):
    """Precision and torch.compile: of the wanted network on a GPU, of the demo's on a CPU, which
    would compile a large one for many minutes.
    """
    low = choose_precision("auto", bench.device)
    precisions = (dict(precision="float32"), dict(precision=low))
    small = bench.config
    if not bench.is_gpu:
        small = fill_in(Config(size="tiny", image=96, patch=16, batch=8), bench.team)
        step_row(bench, f"{low} instead of float32", bench.config, *precisions)
    step_row(bench, f"{low} instead of float32", small, *precisions)
    step_row(bench, "torch.compile", small, dict(compile="off"), dict(compile="on"))


def update_rows(bench):
    """Losses left on the device, AdamW and the moving average in one pass over all parameters."""
    step = Step(bench.config, bench.team)

    def reading_losses():
        return [value.item() for value in step().values()]

    name = "host waits per step: losses stay on the device until logged"
    off, on = (count_waits(function, bench.device) for function in (reading_losses, step))
    bench.row(name, off, on, "waits", "0")

    step.forward(**step.batch)[0]["loss"].backward()
    loop = torch.optim.AdamW(step.trained, lr=0.0, foreach=False, fused=False)
    bench.time_row("AdamW fused", loop.step, step.optimizer.step)
    old = list(step.world.target_encoder.parameters())
    new = list(step.world.encoder.parameters())

    @torch.no_grad()
    def average():
        for target, online in zip(old, new, strict=True):
            target.mul_(0.996).add_(online, alpha=0.004)

    name = "moving average in one foreach call"
    bench.time_row(name, average, lambda: step.world.update_target(0.996))


def batch_rows(bench, count=64):
    """Block masks and domain transitions of a whole batch at once instead of image by image."""
    grid = bench.config.image // bench.config.patch
    generator = torch.Generator().manual_seed(0)
    y = torch.rand(count, 1, bench.config.image, bench.config.image, device=bench.device)
    action = augment.sample_actions(count, generator).to(bench.device)

    def masks(batch):
        sample_masks(batch, grid, generator)

    def masks_one_by_one():
        for _ in range(count):
            masks(1)

    def actions_one_by_one():
        for image, change in zip(y.split(1), action.split(1), strict=True):
            augment.apply_action(image, change)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    limit = f"{count} images; one core, or the GPU"
    name = f"block masks of a batch at once, {grid} × {grid}"
    bench.time_row(name, masks_one_by_one, lambda: masks(count), limit)
    name = f"domain transitions T_a of a batch at once, {bench.config.image}²"
    bench.time_row(name, actions_one_by_one, lambda: augment.apply_action(y, action), limit)
    torch.set_num_threads(threads)


NETWORK_ROWS = [encoder_rows, attention_rows, setting_rows, update_rows, batch_rows]


# ---------------------------------------------------------------- rows: films
def crop_row(bench, count=64):
    """The two crops of a film from a packed file instead of from PNG files."""
    folder = bench.folder / "crops"
    folder.mkdir()
    for i in range(count):
        write_film(folder / f"{i}.png", i, (320, 384))
    films = open_films(folder, side=320)
    pack = bench.folder / "crops.pack"
    pack_films(films, pack)

    def cut_all(views):
        for i in range(count):
            views[0, i]

    off, on = (Views(source, 224, 0) for source in (films, open_films(pack, side=320)))
    slow, fast = pair(lambda: cut_all(off), lambda: cut_all(on), CPU)
    name = "two 224² crops of a film: PNG of side 320 → packed file"
    bench.row(name, count / slow, count / fast, "films/s", "one core; goal 900")


def jpeg_row(bench, count=8):
    """Large JPEGs decoded at a reduced scale."""
    paths = [bench.folder / f"{i}.jpeg" for i in range(count)]
    for i, path in enumerate(paths):
        write_film(path, i, (2500, 3000))
    off, on = pair(
        lambda: [plain_decode(path, 320) for path in paths],
        lambda: [fit(read_film(path, 320), 320) for path in paths],
        CPU,
    )
    name = "2500 × 3000 JPEG to side 320: reduced-scale decode"
    bench.row(name, count / off, count / on, "films/s", "one core; goal 5 ×")


def write_film(path, i, size):
    """Phantom i with film grain as a picture of size (width, height) px; the suffix decides how."""
    picture = Image.fromarray(phantom.make_phantom(0, i, 256)["film"])
    film = np.asarray(picture.resize(size, Image.Resampling.BICUBIC))
    grain = np.random.default_rng(i).normal(0, 3, film.shape)
    film = np.clip(film + grain, 0, 255).astype(np.uint8)
    Image.fromarray(film).save(path, quality=95)  # PNG has no quality and ignores it


def plain_decode(path, side):
    """Open, convert, resize: what most loaders do. → uint8 with short side `side`"""
    image = Image.open(path).convert("L")
    scale = side / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC))


FILM_ROWS = [crop_row, jpeg_row]


def main(argv=None):
    """Print the table, or time one step; argv: the command line without the program."""
    argv = sys.argv[1:] if argv is None else argv
    is_step = argv[:1] == ["step"]
    prog = "python -m lab.bench" + (" step" if is_step else "")
    config = parse(Config, __doc__, argv[1:] if is_step else argv, prog)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # silences the profiler's own chatter
    team = start_team(config.device)
    run = time_step if is_step else table
    run(fill_in(config, team), team)
    team.leave()


if __name__ == "__main__":
    run_script(main)
