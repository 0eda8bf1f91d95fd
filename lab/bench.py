"""How fast does this machine pre-train, and what does each optimisation bring?

    python -m lab.bench                     # every optimisation, off and on: a few minutes
    python -m lab.bench step --size base    # films/s, GFLOP per film, share of the matmul peak
    python -m lab.bench step --batch 8 --visible 40 --masked 82 --targets 82
    torchrun --nproc_per_node=2 -m lab.bench step --size tiny --image 64 --patch 8 --batch 32
    python -m lab.bench scale               # time and memory against network, image and batch

Off and on take turns, so that another load on the machine slows both; every figure is a median.
The films are made up: nothing is downloaded. The tables go to the screen, nothing is kept.
"""

import dataclasses
import itertools
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.profiler import ProfilerActivity, profile

import augment
from data import Views, open_films
from lab.ablation import AblatedCheXWorld
from masks import mask_sizes, sample_masks
from model import SIZES, CheXWorld, ViT, attend, take
from plumbing import phantom
from plumbing.checkpoint import read_log
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

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


@dataclasses.dataclass
class Config:
    size: str = flag("base", "network", list(SIZES))
    image: int = flag(224, "side of the crops, px")
    patch: int = flag(16, "side of a patch, px")
    batch: int = flag(None, "films per step and process [2 on a CPU, 64 on a GPU]")
    visible: int = flag(None, "patches of a view that the context encoder sees [80 of 196]")
    masked: int = flag(None, "patches of a view that the local task predicts [92 of 196]")
    targets: int = flag(None, "patches of the other view that the global task predicts [all]")
    precision: str = flag("auto", "as in pretrain.py", ["auto", "float32", "bfloat16"])
    compile: str = flag("auto", "torch.compile the step; auto = on GPUs", ["auto", "on", "off"])
    checkpointing: bool = flag(False, "recompute activations in the backward pass")
    device: str = flag("auto", "auto, cpu, cuda")
    threads: int = flag(None, "CPU threads of a process [all cores]")
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
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        function()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = sorted((e.start_ns(), e.nbytes()) for e in events)
    return max(itertools.accumulate((size for _, size in changes), initial=0))


def count_waits(function, device):
    """How often a call makes the host wait for the device. On a CPU: operations that would."""
    function()
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            function()
        torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(w.message) for w in seen)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        function()
    waiting = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select")
    # AdamW's fused kernel for CPUs reads its step counts, the one for GPUs does not.
    return sum(e.name in waiting and not is_within(e, "aten::_fused_adamw_") for e in seen.events())


def is_within(event, name):
    """Whether a profiler event happened inside another one called `name`."""
    while event and event.name != name:
        event = event.cpu_parent
    return event is not None


# ---------------------------------------------------------------- the training step
class FewerTargets(AblatedCheXWorld):
    """A CheXWorld that predicts only the first `count` patches of the other view."""

    def between(self, target, context, keep, coords, action):
        count = self.count
        return super().between(target[:, :count], context, keep, coords[:, :count], action)


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
    )


class Step:
    """pretrain.py's step on a made-up batch: forward, backward, clip, AdamW, moving average.

    step() → the losses, still on the device. more: settings that differ from the config's.
    """

    def __init__(self, config, team, **more):
        torch.manual_seed(0)
        self.config = dataclasses.replace(config, **more)
        self.device = team.device
        is_whole = config.targets == (config.image // config.patch) ** 2
        World = CheXWorld if is_whole else FewerTargets
        self.world = World(config.image, config.patch, **SIZES[config.size]).to(team.device)
        self.world.count = config.targets
        self.set_checkpointing(self.config.checkpointing)
        self.trained = [p for p in self.world.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, weight_decay=0.05, fused=True)
        self.forward = prepare_forward(self.world, self.config.compile, team)
        self.batch = made_up_batch(config, team.device)

    def set_checkpointing(self, on):
        """Recompute the activations of all blocks in the backward pass, or keep them."""
        self.world.encoder.save_memory = on
        self.world.predictor.save_memory = on

    def __call__(self):
        with autocast(self.device, self.config.precision):
            losses, _ = self.forward(**self.batch)
        losses["loss"].backward()
        clip_and_step(self.world, self.optimizer, 1.0)
        self.world.update_target(0.996)
        return losses


def count_flops(config):
    """FLOPs of the matrix products of one step in one process, as PyTorch's counter counts them.

    A backward pass counts as two forward ones, as one where it ends at the pixels.
    What is computed again does not count.
    """
    shape = SIZES[config.size]
    D = shape["dim"]
    d = shape["predictor_dim"]
    N = (config.image // config.patch) ** 2
    K = config.visible

    def blocks(tokens, dim, depth):
        # Per token: 24 D² in qkv, projection and MLP; 4 L D in the two products of attention.
        return depth * tokens * (24 * dim * dim + 4 * tokens * dim)

    def predictor(asked):
        ends = 2 * D * d * (K + asked)  # into the predictor's width and out of it
        policy = 2 * asked * ((d + 4) * d + 2 * d * d)
        return ends + policy + blocks(K + asked, d, shape["predictor_depth"])

    embedding = (2 * K + N) * 2 * config.patch**2 * D
    encoders = 3 * blocks(K, D, shape["depth"]) + blocks(N, D, shape["depth"])
    predictions = 3 * predictor(config.masked) + 3 * predictor(config.targets)
    return 2 * config.batch * (embedding + encoders + predictions)


# ---------------------------------------------------------------- one step, and its growth
def time_step(config, team):
    """Time the training step; print token counts, films/s, GFLOP per film, share of the peak."""
    config = fill_in(config, team)
    peak = matmul_peak(team.device, config.precision)
    step = Step(config, team)
    first = timed(step, team.device)
    step()
    seconds = statistics.median(timed(step, team.device) for _ in range(config.steps))
    team.wait()
    flops = count_flops(config)
    memory = peak_memory(step, team.device)
    team.say(
        f"{config.size} ViT, {config.image}² px in {config.patch}² patches, "
        f"{config.batch} films × {team.world} process(es), two views each; "
        f"{config.visible} visible, {config.masked} masked, {config.targets} global targets "
        f"of {(config.image // config.patch) ** 2}; "
        f"{config.precision} on {team.device}, {torch.get_num_threads()} threads\n"
        f"{config.batch * team.world / seconds:.3f} films/s, {1e3 * seconds:.1f} ms per step "
        f"(the first {first:.1f} s), peak memory above weights and moments {memory / 1e9:.2f} GB\n"
        f"{flops / config.batch / 1e9:.2f} GFLOP per film: {flops / seconds / 1e9:.1f} GFLOP/s, "
        f"{flops / seconds / peak:.1%} of the matmul peak {peak / 1e9:.1f} GFLOP/s"
    )


# fmt: off
SCALE = {  # network, image, patch, batch
    "cuda": [("base", 224, 16, 64), ("base", 224, 16, 128), ("base", 224, 16, 256),
             ("base", 512, 16, 32), ("small", 224, 16, 256), ("large", 224, 16, 64)],
    "cpu": [("tiny", 64, 8, 32), ("tiny", 64, 8, 128), ("tiny", 128, 16, 32),
            ("small", 224, 16, 2), ("small", 224, 16, 4), ("base", 224, 16, 2)],
}
# fmt: on


def scale(config, team):
    """Print time and peak memory of the step, weights included, against network, image, batch."""
    titles = "network | image | batch | films/s | GFLOP per film | peak GB"
    print(f"| {titles} | peak GB, checkpointing | its time |\n|{'---|' * 8}")
    for size, image, patch, batch in SCALE[team.device.type]:
        case = dataclasses.replace(config, size=size, image=image, patch=patch, batch=batch)
        case = fill_in(case, team)
        line = f"| {size} | {image} | {batch}"
        try:
            seconds, memory = time_and_memory(Step(case, team, checkpointing=False))
            lean_seconds, lean_memory = time_and_memory(Step(case, team, checkpointing=True))
        except torch.cuda.OutOfMemoryError:
            print(f"{line} | out of memory |")
            continue
        print(
            f"{line} | {batch / seconds:.3g} | {count_flops(case) / batch / 1e9:.3g} "
            f"| {memory / 1e9:.2f} | {lean_memory / 1e9:.2f} | {lean_seconds / seconds:.2f} × |",
            flush=True,
        )


def time_and_memory(step):
    """Seconds of a step, and bytes at its peak: weights, moving average, both moments included."""
    passing = peak_memory(step, step.device)
    weights = sum(p.nbytes for p in step.world.parameters())
    moments = sum(2 * p.nbytes for p in step.trained)
    return timed(step, step.device), passing + weights + moments


# ---------------------------------------------------------------- the table
@dataclasses.dataclass
class Bench:
    """What every row needs: the filled-in flags, the process, and what this machine can do."""

    config: Config
    team: Team
    peaks: dict  # FLOP/s of matrix products by precision
    folder: Path = None  # for temporary files

    @property
    def device(self):
        return self.team.device

    @property
    def is_gpu(self):
        return self.device.type == "cuda"

    def demo(self):
        """The flags of pretrain.py's demo."""
        return fill_in(Config(size="tiny", image=64, patch=8, batch=16), self.team)

    def row(self, name, off, on, unit, limit=""):
        """Print one row; the gain is a ratio of rates, or of times or bytes the other way round."""
        old, new = (off, on) if unit.endswith("/s") else (on, off)
        gain = new / old if old else float("inf")
        figures = f"{off:9.4g} | {on:9.4g} | {unit:9s} | {gain:6.2f} ×"
        print(f"| {name:58s} | {figures} | {limit:64s} |", flush=True)

    def time_row(self, name, off, on, limit="", seconds=3.0):
        """Time two functions in turn and print their row in milliseconds."""
        slow, fast = pair(off, on, self.device, seconds)
        self.row(name, 1e3 * slow, 1e3 * fast, "ms", limit)


def table(config, team):
    """Print every optimisation, off and on."""
    peaks = {name: matmul_peak(team.device, name) for name in ("float32", "bfloat16")}
    bench = Bench(fill_in(config, team), team, peaks)
    print(
        f"{team.device}, {torch.get_num_threads()} threads, torch {torch.__version__}: "
        f"matmul peak {peaks['float32'] / 1e12:.3f} TFLOP/s in float32, "
        f"{peaks['bfloat16'] / 1e12:.3f} in bfloat16"
    )
    titles = f"{'optimisation':58s} | {'off':>9s} | {'on':>9s} | {'unit':9s} | {'gain':>8s}"
    print(f"\n| {titles} | {'limit':64s} |\n|{'---|' * 6}")
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        bench.folder = Path(folder)
        for rows in (*NETWORK_ROWS, *FILM_ROWS):
            rows(bench)


# ---------------------------------------------------------------- rows: networks
def encoder_rows(bench):
    """Hidden patches dropped before the encoder, both views in one call."""
    vit, x, keep = context_encoder(bench)

    def encode(drop=True, calls=1):
        with autocast(bench.device, bench.config.precision):
            for images, seen in zip(x.chunk(calls), keep.chunk(calls), strict=True):
                tokens = vit(images, seen) if drop else take(vit(images), seen)
                tokens.float().square().mean().backward()

    name = "hidden patches dropped: context encoder, both passes"
    limit = f"{vit.grid**2 / bench.config.visible:.2f} × = all patches / visible ones"
    bench.time_row(name, lambda: encode(drop=False), encode, limit)
    name = "both views in one encoder call, both passes"
    bench.time_row(name, lambda: encode(calls=2), encode, "1 × where one view fills the machine")


def context_encoder(bench):
    """A context encoder and its input. → (ViT, x (2B, 1, H, W), keep (2B, K))"""
    torch.manual_seed(0)
    config, shape = bench.config, SIZES[bench.config.size]
    vit = ViT(config.image, config.patch, shape["dim"], shape["depth"], shape["heads"])
    batch = made_up_batch(config, bench.device)
    return vit.to(bench.device), batch["x"], batch["keep"]


def embedding_row(bench):
    """Hidden patches dropped before the patch projection instead of after it."""
    vit, x, keep = context_encoder(bench)
    p = vit.patch
    patches = x.unfold(2, p, p).unfold(3, p, p).reshape(len(x), -1, p * p)  # (2B, N, p²)
    proj = vit.patch_embed.proj

    def project(tokens):
        return F.linear(tokens, proj.weight.flatten(1), proj.bias)

    bench.time_row(
        "  dropped before the patch projection instead of after it",
        lambda: take(project(patches), keep),
        lambda: project(take(patches, keep)),
        f"{vit.grid**2 / bench.config.visible:.2f} ×",
    )


def attention_rows(bench):
    """model.attend against the way it does not take, on the shape of the target encoder."""
    for precision in dict.fromkeys(("float32", bench.config.precision)):
        attention_row(bench, precision)


def attention_row(bench, precision):
    """The same in one precision, forward and backward pass."""
    config, shape = bench.config, SIZES[bench.config.size]
    tokens = (config.image // config.patch) ** 2
    size = (2 * config.batch, shape["heads"], tokens, shape["dim"] // shape["heads"])
    options = dict(device=bench.device, dtype=getattr(torch, precision), requires_grad=True)
    qkv = [torch.randn(size, **options) for _ in range(3)]

    def plain(q, k, v):
        return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v

    def both_passes(attention):
        attention(*qkv).sum().backward()

    is_fused = bench.is_gpu or precision == "float32"  # as model.attend decides
    other = plain if is_fused else F.scaled_dot_product_attention
    way = "plain → fused" if is_fused else "fused → plain"
    name = f"attention in {precision}, both passes: {way}"
    bench.time_row(name, lambda: both_passes(other), lambda: both_passes(attend))


def precision_rows(bench):
    """The step in the faster precision of this machine instead of float32."""
    low = choose_precision("auto", bench.device)
    peak, low_peak = bench.peaks["float32"], bench.peaks[low]
    for case in [bench.config] if bench.is_gpu else [bench.demo(), bench.config]:
        plain = Step(case, bench.team, precision="float32")
        off, on = pair(plain, Step(case, bench.team, precision=low), bench.device)
        flops = count_flops(case)
        shares = f"{flops / off / peak:.0%} → {flops / on / low_peak:.0%}"
        limit = f"{low_peak / peak:.2f} × = matmul peaks; MFU {shares}"
        name = f"{low} instead of float32: {case.size} step"
        bench.row(name, case.batch / off, case.batch / on, "films/s", limit)


def checkpointing_rows(bench):
    """Activations computed again in the backward pass: what that saves, and its price."""
    config = dataclasses.replace(bench.config, batch=max(bench.config.batch, 8))
    full = Step(config, bench.team, checkpointing=False)
    lean = Step(config, bench.team, checkpointing=True)
    off, on = (peak_memory(step, bench.device) / 1e9 for step in (full, lean))
    name = f"activation checkpointing: memory of a step, batch {config.batch}"
    bench.row(name, off, on, "GB", "above weights and moments")
    limit = "0.77 × = one more forward pass of what is trained"
    bench.time_row("  and its price: time of a step", full, lean, limit)


def step_rows(bench):
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


def compile_row(bench):
    """The step compiled: of the wanted network on a GPU, of the demo's on a CPU."""
    config = bench.config if bench.is_gpu else bench.demo()
    plain = Step(config, bench.team, compile="off")
    compiled = Step(config, bench.team, compile="on")
    first = timed(compiled, bench.device)
    off, on = pair(plain, compiled, bench.device)
    share = count_flops(config) / on / bench.peaks[config.precision]
    limit = f"compiling took {first:.0f} s; MFU then {share:.0%}"
    name = f"torch.compile: {config.size} step"
    bench.row(name, config.batch / off, config.batch / on, "films/s", limit)


def batch_rows(bench, count=64):
    """Block masks and domain transitions of a whole batch at once instead of image by image."""
    grid = bench.config.image // bench.config.patch
    generator = torch.Generator().manual_seed(0)
    y = torch.rand(count, 1, bench.config.image, bench.config.image, device=bench.device)
    action = augment.sample_actions(count, generator).to(bench.device)

    def masks(batch):
        sample_masks(batch, grid, generator, device=bench.device)

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


NETWORK_ROWS = [encoder_rows, embedding_row, attention_rows, precision_rows]
NETWORK_ROWS += [checkpointing_rows, step_rows, compile_row, batch_rows]


# ---------------------------------------------------------------- rows: films
def crop_row(bench):
    """The two crops of a film from a packed file instead of from PNG files."""
    pack = write_pack(bench.folder / "crops", 64)
    off = crops_per_second(open_films(pack.parent / "films", side=320))
    on = crops_per_second(open_films(pack, side=320))
    name = "two 224² crops of a film: PNG of side 320 → packed file"
    bench.row(name, off, on, "films/s", "one core; goal 900")


def crops_per_second(films, size=224, seconds=2.0):
    """Films per second out of data.Views in this process."""
    views = Views(films, size, 0)
    views[0, 0]
    done = 0
    began = time.perf_counter()
    while time.perf_counter() < began + seconds:
        views[1, done % len(films)]
        done += 1
    return done / (time.perf_counter() - began)


def jpeg_rows(bench, count=240):
    """Large JPEGs decoded at a reduced scale; packing them with two workers instead of none."""
    folder = bench.folder / "jpegs"
    folder.mkdir()
    paths = [folder / f"{i}.jpeg" for i in range(8)]
    for i, path in enumerate(paths):
        write_film(path, i, (2500, 3000))
    off, on = pair(
        lambda: [plain_decode(path, 320) for path in paths],
        lambda: [fit(read_film(path, 320), 320) for path in paths],
        CPU,
    )
    name = "2500 × 3000 JPEG to side 320: reduced-scale decode"
    bench.row(name, len(paths) / off, len(paths) / on, "films/s", "one core; goal 5 ×")

    for i in range(len(paths), count):
        os.link(paths[i % len(paths)], folder / f"{i}.jpeg")
    films = open_films(folder, side=320)

    def rate(workers):
        pack = bench.folder / f"{workers}.pack"
        return count / timed(lambda: pack_films(films, pack, workers), CPU)

    off, on = rate(0), rate(2)
    size = f"{5e5 / on / 3600:.1f} h with two workers, {5e5 * films[0].nbytes / 1e9:.0f} GB"
    name = "packing these JPEGs: no worker → two"
    bench.row(name, off, on, "films/s", f"2 ×; 0.5 M films: {size}")


def write_pack(folder, count):
    """Phantoms of 320 × 384 px as folder/films/*.png and as folder/films.pack. → the pack's path"""
    (folder / "films").mkdir(parents=True)
    for i in range(count):
        write_film(folder / "films" / f"{i}.png", i, (320, 384))
    pack_films(open_films(folder / "films", side=320), folder / "films.pack")
    return folder / "films.pack"


def write_film(path, i, size):
    """A phantom with film grain as a picture of size (width, height) px; the suffix decides how."""
    picture = Image.fromarray(phantom.make_phantom(0, i, 256)["film"])
    film = np.asarray(picture.resize(size, Image.Resampling.BICUBIC))
    grain = np.random.default_rng(i).normal(0, 3, film.shape)
    options = {"quality": 95} if path.suffix == ".jpeg" else {}
    Image.fromarray(np.clip(film + grain, 0, 255).astype(np.uint8)).save(path, **options)


def plain_decode(path, side):
    """Open, convert, resize: what most loaders do. → uint8 with short side `side`"""
    image = Image.open(path).convert("L")
    scale = side / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC))


def index_row(bench, count=500_000):
    """The index of generated film names from its cache instead of from a first look."""
    root = bench.folder / "many"
    for study in range(count // 4):
        folder = root / f"p{study // 40:04d}" / f"s{study:06d}"
        folder.mkdir(parents=True)
        for film in range(4):
            (folder / f"{film}.jpg").touch()
    off, on = (timed(lambda: open_films(root, bench.folder), CPU) for _ in range(2))
    name = f"index of {count:,} films in {count // 4:,} folders: cached"
    bench.row(name, off, on, "s", "goal < 10 s")


# ---------------------------------------------------------------- rows: the real script
def script_flags(bench):
    """Network flags and batch of the scripts that the rows below run. → (flags, films)"""
    if bench.is_gpu:
        return "--device cuda --size base --image 224 --patch 16", 64
    return "--device cpu --size tiny --image 64 --patch 8", 16


def script_rows(bench):
    """pretrain.py from a packed file beside the step alone; its crops made by workers or not."""
    flags, batch = script_flags(bench)
    workers = 8 if bench.is_gpu else 1
    if bench.is_gpu:
        torch.cuda.empty_cache()  # this process's, for the runs below
    alone = rate_of(f"-m lab.bench step {flags} --batch {batch} --steps 20")
    pack = write_pack(bench.folder / "run", 600 if bench.is_gpu else 64)
    words = f"pretrain.py --data {pack} {flags} --batch {batch} --epochs 60 --warmup 1 --holdout 1"
    words += " --max_steps 120 --log_every 40"
    rates = []
    waits = []
    for count in (0, workers):
        out = bench.folder / f"workers{count}"
        run(f"{words} --out {out} --workers {count}")
        last = read_log(out / "log.csv")[-1]
        rates.append(float(last["images_per_s"]))
        waits.append(float(last["data_wait"]))
    name = "the step alone → the real script, from a packed file"
    bench.row(name, alone, max(rates), "films/s", "1 ×")
    limit = f"data_wait {waits[0]:.1%} → {waits[1]:.1%}, goal < 2 %"
    bench.row(f"  crops in the loop → in {workers} worker(s)", *rates, "films/s", limit)


def process_row(bench):
    """Two processes share a batch; off: one process with one CPU thread."""
    if bench.is_gpu and torch.cuda.device_count() < 2:
        return
    flags, batch = script_flags(bench)
    step = f"-m lab.bench step {flags} --steps 20 --threads 1"
    two = "-m torch.distributed.run --nproc_per_node=2"
    off = rate_of(f"{step} --batch {batch}")
    on = rate_of(f"{two} {step} --batch {batch // 2}")
    bench.row("one process → two, one CPU thread each", off, on, "films/s", "2 ×")


def run(words):
    """Run one of our scripts. → what it printed. UserError with the last line of its errors."""
    command = [sys.executable, *words.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip() or "failed").splitlines()[-1]
        raise UserError(f"{words}: {reason}")
    return done.stdout


def rate_of(words):
    """Films per second that a step command prints."""
    return float(re.search(r"([\d.]+) films/s", run(words))[1])


FILM_ROWS = [crop_row, jpeg_rows, script_rows, process_row, index_row]
COMMANDS = {"table": table, "step": time_step, "scale": scale}


def main(argv=None):
    """Run one of the commands; argv: the command line without the program."""
    argv = list(sys.argv[1:] if argv is None else argv)
    has_command = argv and not argv[0].startswith("-")
    word = argv.pop(0) if has_command else "table"
    if word not in COMMANDS:
        raise UserError(f"lab.bench {word}: say step or scale, or nothing for the whole table")
    config = parse(Config, __doc__, argv, prog=f"python -m lab.bench {word}")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # silences the profiler's own chatter
    team = start_team(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    COMMANDS[word](config, team)
    team.leave()


if __name__ == "__main__":
    run_script(main)
