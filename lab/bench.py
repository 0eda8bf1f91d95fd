"""Measure what each technique brings, off against on in one run, with the limit that the hardware sets beside it.

    python bench.py                               # everything this machine can measure, one table, a few minutes
    python bench.py step --size base --batch 8 --visible 40 --masked 82 --targets 82       # one training step at these token counts
    torchrun --nproc_per_node=2 bench.py step --size tiny --image 64 --patch 8 --batch 32  # the same under DDP
    python bench.py roofline                      # FLOPs and bytes of each part, predicted on H100, H200, RTX 4090, measured here
    python bench.py scale                         # time and memory against network, image and batch

Off and on take turns, so another load on the machine hits both; a figure is the median. Films are made up: nothing is downloaded.
"""

import dataclasses
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.profiler import ProfilerActivity, profile

import augment
from data import Views, open_films
from lab.meter import (
    Chip,
    Step,
    bandwidth,
    count_memory,
    count_parts,
    fitting,
    made_up,
    matmul_peak,
    one_core,
    pair,
    peak_memory,
    print_roofline,
    show,
    timed,
    waits,
)
from masks import mask_sizes, sample_masks
from model import SIZES, ViT, attend, grid_coords, sincos, take
from plumbing import phantom
from plumbing.checkpoint import read_log
from plumbing.film import fit, read_film
from plumbing.launch import (
    UserError,
    autocast,
    choose_precision,
    flag,
    parse,
    run_script,
    start_team,
)
from plumbing.pack import pack_films

ROOT = Path(__file__).parents[1]


@dataclasses.dataclass
class Config:
    size: str = flag("base", "network", list(SIZES))
    image: int = flag(224, "side of the crops, px")
    patch: int = flag(16, "side of a patch, px")
    batch: int = flag(
        None,
        "films a step in each process, two views each [8 on a CPU; on a GPU what fits by count, at most 256]",
    )
    visible: int = flag(
        None, "patches of a view that the context encoder sees [METHOD.md: 80 of 196]"
    )
    masked: int = flag(None, "patches of a view that the local task predicts [92 of 196]")
    targets: int = flag(None, "patches of the other view that the global task predicts [all]")
    precision: str = flag("auto", "as in pretrain.py", ["auto", "float32", "bfloat16"])
    compile: str = flag("auto", "torch.compile the step; auto = on GPUs", ["auto", "on", "off"])
    checkpointing: bool = flag(False, "recompute activations in the backward pass")
    device: str = flag("auto", "auto, cpu, cuda")
    threads: int = flag(None, "CPU threads of a process [all cores]")
    steps: int = flag(5, "steps to time")


def settle(config, team):
    """Fill in what the user left open. → Config with batch, precision and token counts"""
    grid = config.image // config.patch
    visible, masked = mask_sizes(grid)
    precision = choose_precision(config.precision, team.device)
    gpu = team.device.type == "cuda"
    config = dataclasses.replace(
        config,
        precision=precision,
        compile="on" if config.compile == "on" or config.compile == "auto" and gpu else "off",
        visible=config.visible or visible,
        masked=config.masked or masked,
        targets=config.targets or grid**2,
    )
    if not config.batch:
        most = (
            min(
                256,
                fitting(
                    config,
                    torch.cuda.get_device_properties(team.device).total_memory,
                    config.checkpointing,
                ),
            )
            if gpu
            else 8
        )
        config = dataclasses.replace(config, batch=most)
    for name, count in (
        ("--visible + --masked", config.visible + config.masked),
        ("--targets", config.targets),
    ):
        if count > grid**2:
            raise UserError(f"{name} {count}: a view has only {grid**2} patches")
    return config


# ------------------------------------------------------------------------------------------------ commands
def time_step(config, team):
    """Time the step; print token counts, rate, share of the matmul peak."""
    config = settle(config, team)
    flops = sum(p.flops for p in count_parts(config))
    peak = matmul_peak(team.device, config.precision)
    step = Step(config, team)
    began = time.perf_counter()
    step()
    first = time.perf_counter() - began
    step()
    seconds = statistics.median(timed(step, team.device) for _ in range(config.steps))
    if team.world > 1:
        torch.distributed.barrier()
    team.say(
        f"{config.size} ViT, {config.image}² px in {config.patch}² patches, {config.batch} films × {team.world} process(es), two views each; "
        f"{config.visible} visible, {config.masked} masked, {config.targets} global targets of {(config.image // config.patch) ** 2}; "
        f"{config.precision} on {team.device}, {torch.get_num_threads()} threads"
    )
    team.say(
        f"{config.batch * team.world / seconds:.3f} films/s, {1e3 * seconds:.1f} ms a step (the first {first:.1f} s), "
        f"peak memory above weights and moments {peak_memory(step, team.device) / 1e9:.2f} GB"
    )
    team.say(
        f"{flops / 1e9:.1f} GFLOP a step: {flops / seconds / 1e9:.1f} GFLOP/s, {flops / seconds / peak:.1%} of the matmul peak {peak / 1e9:.1f}"
    )
    return seconds


def roofline(config, team):
    """The step part by part: counted, predicted on GPUs; predicted and measured here."""
    here = settle(config, team)
    print_roofline(dataclasses.replace(here, batch=config.batch or 256, precision="bfloat16"))
    print("\nhere:")
    seconds = time_step(config, team)
    chip = Chip("here", matmul_peak(team.device, here.precision), bandwidth(team.device), 0, ())
    predicted = sum(chip.seconds(p) for p in count_parts(here, here.compile == "on"))
    print(
        f"predicted {1e3 * predicted:.1f} ms at {chip.peak / 1e12:.2f} TFLOP/s and {chip.speed / 1e9:.0f} GB/s; "
        f"measured {1e3 * seconds:.1f} ms"
    )


#                 network image patch batch
SCALE = {
    "cuda": [
        "base 224 16 64",
        "base 224 16 128",
        "base 224 16 256",
        "base 512 16 32",
        "small 224 16 256",
        "large 224 16 64",
    ],
    "cpu": [
        "tiny 64 8 32",
        "tiny 64 8 128",
        "tiny 128 16 32",
        "small 224 16 2",
        "small 224 16 4",
        "base 224 16 2",
    ],
}


def scale(config, team):
    """Time and memory of the step against network, image and batch."""
    print(
        f"| network | image | batch | films/s | GFLOP a film | peak GB (counted) | with checkpointing (counted), time |\n|{'---|' * 7}"
    )
    for size, *numbers in map(str.split, SCALE[team.device.type]):
        image, patch, batch = map(int, numbers)
        case = settle(
            dataclasses.replace(config, size=size, image=image, patch=patch, batch=batch), team
        )
        try:
            (fast, most), (slow, least) = (
                time_and_memory(dataclasses.replace(case, checkpointing=on), team)
                for on in (False, True)
            )
        except torch.cuda.OutOfMemoryError:
            print(f"| {size} | {image} | {batch} | out of memory |")
            continue
        flops, counted = (
            sum(p.flops for p in count_parts(case)) / batch,
            [sum(count_memory(case, on)) / 1e9 for on in (False, True)],
        )
        print(
            f"| {size} | {image} | {batch} | {batch / fast:.3g} | {flops / 1e9:.3g} | {most / 1e9:.2f} ({counted[0]:.2f}) "
            f"| {least / 1e9:.2f} ({counted[1]:.2f}), {slow / fast:.2f} × |",
            flush=True,
        )


def time_and_memory(config, team):
    """Seconds of a step and bytes at its peak: weights, moving average, moments and all that comes and goes."""
    step = Step(config, team)
    more = peak_memory(step, team.device)
    return timed(step, team.device), more + sum(p.nbytes for p in step.world.parameters()) + sum(
        2 * p.nbytes for p in step.trained
    )


def table(config, team):
    """Every technique off and on."""
    peaks = {name: matmul_peak(team.device, name) for name in ("float32", "bfloat16")}
    speed = bandwidth(team.device)
    print(
        f"{team.device}, {torch.get_num_threads()} threads, torch {torch.__version__}: matmul peak {peaks['float32'] / 1e12:.3f} TFLOP/s "
        f"float32, {peaks['bfloat16'] / 1e12:.3f} bfloat16; memory {speed / 1e9:.1f} GB/s"
    )
    print(
        f"\n| {'technique':58s} | {'off':>9s} | {'on':>9s} | {'unit':9s} | {'gain':>8s} | {'limit':64s} |\n|{'---|' * 6}"
    )
    base = settle(
        dataclasses.replace(
            config, batch=config.batch or (64 if team.device.type == "cuda" else 2)
        ),
        team,
    )
    encoder_lines(base, team.device)
    step_lines(base, team, peaks, speed)
    augment_lines(base, team.device)
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    try:
        film_lines(folder)
        run_lines(folder, team.device)
        index_lines(folder)
    finally:
        shutil.rmtree(folder)


def encoder_lines(config, device):
    """Patches dropped early, both views in one call, fused attention, positions from a table."""
    torch.manual_seed(0)
    s, batch, p, K = SIZES[config.size], made_up(config, device), config.patch, config.visible
    vit = ViT(config.image, p, s["dim"], s["depth"], s["heads"]).to(device)
    x, keep, N, proj = batch["x"], batch["keep"], vit.grid**2, vit.patch_embed.proj
    weight, patches = (
        proj.weight.flatten(1),
        x.unfold(2, p, p).unfold(3, p, p).reshape(len(x), N, p * p),
    )

    def encode(hidden_too=False, calls=1):
        with autocast(device, config.precision):
            for images, seen in zip(x.chunk(calls), keep.chunk(calls)):
                (
                    take(vit(images), seen) if hidden_too else vit(images, seen)
                ).float().square().mean().backward()

    off, on = pair(lambda: encode(hidden_too=True), encode, device)
    show(
        "hidden patches dropped: context encoder, both passes",
        1e3 * off,
        1e3 * on,
        "ms",
        f"{N / K:.2f} × = all patches / visible ones",
    )
    project = lambda tokens: F.linear(tokens, weight, proj.bias)
    off, on = pair(
        lambda: take(project(patches), keep), lambda: project(take(patches, keep)), device, 1
    )
    show(
        "  before the patch projection instead of after it",
        1e3 * off,
        1e3 * on,
        "ms",
        f"{N / K:.2f} ×",
    )
    off, on = pair(lambda: encode(calls=2), encode, device)
    show(
        "both views in one encoder call, both passes",
        1e3 * off,
        1e3 * on,
        "ms",
        "1 × where one view fills the machine",
    )
    off, on = pair(
        lambda: take(sincos(grid_coords(vit.grid, device), vit.dim).expand(len(x), -1, -1), keep),
        lambda: take(vit.pos_embed.expand(len(x), -1, -1), keep),
        device,
        1,
    )
    show("positions of the encoder from a table", 1e3 * off, 1e3 * on, "ms")
    attention_line(config, device)


def attention_line(config, device):
    """model.attend against the way it does not take, fused kernel or three plain products, on the target encoder's shape, both passes."""
    s, N = SIZES[config.size], (config.image // config.patch) ** 2
    shape = 2 * config.batch, s["heads"], N, s["dim"] // s["heads"]
    for precision in dict.fromkeys(("float32", config.precision)):
        q, k, v = (
            torch.randn(shape, device=device, dtype=getattr(torch, precision), requires_grad=True)
            for _ in range(3)
        )
        plain = lambda: ((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v).sum().backward()
        fused = lambda: F.scaled_dot_product_attention(q, k, v).sum().backward()
        ours = lambda: attend(q, k, v).sum().backward()
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            ours()
        ran = [
            e.key.removeprefix("aten::_scaled_dot_product_")
            for e in seen.key_averages()
            if e.key.startswith("aten::_scaled_dot_product_")
        ]
        off, on = pair(plain if ran else fused, ours, device)
        show(
            f"attention in {precision}, both passes: "
            + ("plain → fused" if ran else "fused → plain"),
            1e3 * off,
            1e3 * on,
            "ms",
            f"kernel that ran: {ran[0] if ran else 'plain products'}",
        )


def step_lines(config, team, peaks, speed):
    """On whole steps: bfloat16, checkpointing, host waits, the optimizer's loops, compiling."""
    low = choose_precision("auto", team.device)
    for case in [demo(team)] * (team.device.type == "cpu") + [config]:
        plain, step = (
            Step(dataclasses.replace(case, precision=name), team) for name in ("float32", low)
        )
        off, on = pair(plain, step, team.device)
        flops = sum(p.flops for p in count_parts(case))
        show(
            f"{low} instead of float32: {case.size} step",
            case.batch / off,
            case.batch / on,
            "films/s",
            f"{peaks[low] / peaks['float32']:.2f} × = matmul peaks; MFU {flops / off / peaks['float32']:.0%} → {flops / on / peaks[low]:.0%}",
        )
    del plain
    memory_lines(dataclasses.replace(step.config, batch=max(config.batch, 8)), team)
    asking = lambda: [v.sum().item() for v in step().values()]
    show(
        "host waits a step: losses stay on the device until logged",
        waits(asking, team.device),
        waits(step, team.device),
        "waits",
        "0",
    )
    optimizer_lines(step, team.device, speed)
    compile_line(config, team, peaks)


def memory_lines(config, team):
    """Activation checkpointing: what it saves, and its price."""
    full, lean = (Step(dataclasses.replace(config, checkpointing=on), team) for on in (False, True))
    (off, kept), (on, rest) = (
        (peak_memory(s, team.device) / 1e9, count_memory(config, s is lean)[1] / 1e9)
        for s in (full, lean)
    )
    show(
        f"activation checkpointing: memory of a step, batch {config.batch}",
        off,
        on,
        "GB",
        f"counted as kept for the backward pass: {kept:.2f} → {rest:.2f}; gradients come on top",
    )
    off, on = pair(full, lean, team.device)
    show(
        "  and its price: time of a step",
        1e3 * off,
        1e3 * on,
        "ms",
        "0.77 × = one more forward pass of what is trained",
    )


def demo(team):
    """The step of pretrain.py's demo."""
    return settle(Config(size="tiny", image=64, patch=8, batch=16), team)


def compile_line(config, team, peaks):
    """torch.compile: of the wanted step on a GPU, of the demo's on a CPU."""
    config = demo(team) if team.device.type == "cpu" else config
    plain, compiled = (
        Step(dataclasses.replace(config, compile="off"), team),
        Step(dataclasses.replace(config, compile="on"), team),
    )
    seconds = timed(compiled, team.device)
    off, on = pair(plain, compiled, team.device)
    limit = f"compiling took {seconds:.0f} s; MFU then {sum(p.flops for p in count_parts(config)) / on / peaks[config.precision]:.0%}"
    show(
        f"torch.compile: {config.size} step",
        config.batch / off,
        config.batch / on,
        "films/s",
        limit,
    )


def optimizer_lines(step, device, speed):
    """AdamW and the moving average: one pass over all parameters against a loop over them."""
    step.forward(**step.batch)["loss"].backward()
    loop = torch.optim.AdamW(step.trained, lr=0.0, foreach=False, fused=False)
    off, on = pair(loop.step, step.optimizer.step, device, 2)
    step.optimizer.zero_grad(set_to_none=True)
    limit = lambda size, parameters: (
        f"{1e3 * size * sum(p.numel() for p in parameters) / speed:.2f} ms = bytes / memory speed"
    )
    show("AdamW fused", 1e3 * off, 1e3 * on, "ms", limit(28, step.trained))
    pairs = list(zip(step.world.target_encoder.parameters(), step.world.encoder.parameters()))

    @torch.no_grad()
    def average():
        for old, new in pairs:
            old.mul_(0.996).add_(new, alpha=0.004)

    off, on = pair(average, lambda: step.world.update_target(0.996), device, 2)
    show(
        "moving average in one foreach call",
        1e3 * off,
        1e3 * on,
        "ms",
        limit(12, step.world.encoder.parameters()),
    )


def augment_lines(config, device):
    """Block masks and domain transitions of a whole batch at once, against image by image; one core, or the GPU."""
    n, grid, generator = 64, config.image // config.patch, torch.Generator().manual_seed(0)
    y, action = (
        torch.rand(n, 1, config.image, config.image, device=device),
        augment.sample_actions(n, generator).to(device),
    )
    masks = lambda batch: sample_masks(batch, grid, generator, device=device)
    off, on = one_core(lambda: [masks(1) for _ in range(n)], lambda: masks(n), device, 1)
    show(
        f"block masks of a batch at once, {grid} × {grid}",
        1e3 * off / n,
        1e3 * on / n,
        "ms/image",
        "one core, or the GPU",
    )
    each = lambda: [augment.apply_action(v[None], a[None]) for v, a in zip(y, action)]
    off, on = one_core(each, lambda: augment.apply_action(y, action), device, 2)
    show(
        f"domain transitions T_a of a batch at once, {config.image}²",
        1e3 * off / n,
        1e3 * on / n,
        "ms/image",
        "one core, or the GPU",
    )


# ------------------------------------------------------------------------------------------------ films
def film_lines(folder):
    """Two crops from the packed file, reduced-scale JPEG decode, packing: films a second and core."""
    write_pack(folder / "crops" / "films.pack", 64)
    off, on = (
        views_rate(open_films(folder / "crops" / part, side=320))
        for part in ("films", "films.pack")
    )
    show(
        "two 224² crops of a film: PNG of side 320 → packed file",
        off,
        on,
        "films/s",
        "one core; goal 900",
    )
    jpegs = folder / "jpegs"
    jpegs.mkdir()
    paths = [jpegs / f"{i}.jpeg" for i in range(8)]
    for i, path in enumerate(paths):
        write_film(path, i, (2500, 3000))
    off, on = pair(
        lambda: [plain_decode(p, 320) for p in paths],
        lambda: [fit(read_film(p, 320), 320) for p in paths],
        torch.device("cpu"),
    )
    show(
        "2500 × 3000 JPEG to side 320: reduced-scale decode",
        len(paths) / off,
        len(paths) / on,
        "films/s",
        "one core; goal 5 ×",
    )
    for i in range(8, 240):
        os.link(paths[i % 8], jpegs / f"{i}.jpeg")
    films = open_films(jpegs, side=320)
    off, on = (
        len(films) / timed(lambda: pack_films(films, folder / f"{n}.pack", n), torch.device("cpu"))
        for n in (0, 2)
    )
    limit = f"2 ×; 0.5 M films: {5e5 / on / 3600:.1f} h with two workers, {5e5 * films[0].nbytes / 1e9:.0f} GB"
    show("packing these JPEGs: no worker → two", off, on, "films/s", limit)


def write_pack(path, count):
    """`count` phantoms of 320 × 384 px as PNG files in a folder `films` beside `path`, and packed at `path`."""
    folder = path.parent / "films"
    folder.mkdir(parents=True)
    for i in range(count):
        write_film(folder / f"{i}.png", i, (320, 384))
    pack_films(open_films(folder, side=320), path)


def write_film(path, i, size):
    """A phantom as a PNG, or as a large JPEG with film grain. size (width, height) px"""
    film = np.asarray(
        Image.fromarray(phantom.make_phantom(0, i, 256)["film"]).resize(
            size, Image.Resampling.BICUBIC
        )
    )
    grain = np.random.default_rng(i).normal(0, 3, film.shape)
    Image.fromarray(np.clip(film + grain, 0, 255).astype(np.uint8)).save(
        path, **({"quality": 95} if path.suffix == ".jpeg" else {})
    )


def plain_decode(path, side):
    """Open, convert, resize: what most loaders do. → uint8 with short side `side`"""
    image = Image.open(path).convert("L")
    scale = side / min(image.size)
    return np.asarray(
        image.resize(
            (round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC
        )
    )


def views_rate(films, size=224, seconds=2.0):
    """Films a second out of data.Views in this process."""
    views, done = Views(films, size, 0), 0
    views[0, 0]
    began = time.perf_counter()
    while time.perf_counter() < began + seconds:
        views[1, done % len(films)]
        done += 1
    return done / (time.perf_counter() - began)


def index_lines(folder, count=500_000):
    """The index of half a million generated film names: first look, then from its cache."""
    root = folder / "half a million"
    for study in range(count // 4):
        where = root / f"p{study // 40:04d}" / f"s{study:06d}"
        where.mkdir(parents=True)
        for film in range(4):
            (where / f"{film}.jpg").touch()
    off, on = (timed(lambda: open_films(root, folder), torch.device("cpu")) for _ in range(2))
    show(f"index of {count:,} films in {count // 4:,} folders: cached", off, on, "s", "goal < 10 s")


# ------------------------------------------------------------------------------------------------ the real script, and two processes
def run_lines(folder, device):
    """The real script from a packed file against the step alone, its crops made in the loop or by a worker; one process against two."""
    gpu, kind = device.type == "cuda", f"--device {device.type}"
    shape, share = (
        ("--size base --image 224 --patch 16 ", 64)
        if gpu
        else ("--size tiny --image 64 --patch 8 ", 16)
    )
    shape += kind
    if gpu:
        torch.cuda.empty_cache()  # this process's, for the runs below
    alone = rate_of(f"bench.py step {shape} --batch {share} --steps 20")
    write_pack(folder / "run" / "films.pack", 600 if gpu else 64)
    short = "--epochs 60 --warmup 1 --holdout 1 --max_steps 120 --log_every 40"
    rates, waited = [], []
    for workers in (0, 8 if gpu else 1):
        out = folder / f"workers{workers}"
        run(
            f"pretrain.py --data {folder / 'run' / 'films.pack'} --out {out} {shape} --batch {share} {short} --workers {workers}"
        )
        last = read_log(out / "log.csv")[-1]
        rates, waited = [*rates, float(last["images_per_s"])], [*waited, float(last["data_wait"])]
    show(
        "the step alone → the real script, from a packed file", alone, max(rates), "films/s", "1 ×"
    )
    show(
        f"  crops in the loop → in {8 if gpu else 1} worker(s)",
        *rates,
        "films/s",
        f"data_wait {waited[0]:.1%} → {waited[1]:.1%}, goal < 2 %",
    )
    if not gpu or torch.cuda.device_count() > 1:
        words = f"bench.py step {shape} --steps 20 --batch"
        off, on = (
            rate_of(f"{words} {share} --threads 1"),
            rate_of(
                f"-m torch.distributed.run --nproc_per_node=2 {words} {share // 2} --threads 1"
            ),
        )
        show(
            "one process → two, " + ("nccl" if gpu else "gloo, one thread each"),
            off,
            on,
            "films/s",
            "2 ×",
        )
        if not gpu:
            show(
                "one process, all threads → two, one thread each",
                rate_of(f"{words} {share}"),
                on,
                "films/s",
                "the same batch over both",
            )


def run(words):
    """Run one of our scripts; its output, or Stop with its last line."""
    done = subprocess.run(
        [sys.executable, *words.split()], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        raise UserError(f"{words}: {(done.stderr.strip() or 'failed').splitlines()[-1]}")
    return done.stdout


def rate_of(words):
    """Films a second that a step command prints."""
    return float(re.search(r"([\d.]+) films/s", run(words))[1])


def main():
    word, argv = (
        (sys.argv[1], sys.argv[2:])
        if sys.argv[1:] and sys.argv[1][0] != "-"
        else ("table", sys.argv[1:])
    )
    commands = {"table": table, "step": time_step, "roofline": roofline, "scale": scale}
    if word not in commands:
        raise UserError(
            f"bench.py {word}: say step, roofline or scale, or nothing for the whole table"
        )
    config = parse(Config, __doc__, argv, prog=f"bench.py {word}")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own chatter
    team = start_team(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    commands[word](config, team)
    team.leave()


if __name__ == "__main__":
    run_script(main)
