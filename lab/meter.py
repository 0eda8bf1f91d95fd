"""What a training step costs, on the clock and on paper: FLOPs and bytes of each part, the time a roofline allows. For bench.py.

A config is anything with size, image, patch, batch (films in one process), visible, masked, targets (patches of a view) and precision.
"""

import itertools
import statistics
import time
import warnings
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

import augment
from lab.ablation import AblatedCheXWorld
from model import SIZES, CheXWorld
from plumbing.launch import autocast


# ------------------------------------------------------------------------------------------------ on the clock
def finish(device):
    """Wait for the GPU, if there is one."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(function, device):
    """Seconds of one call, the GPU's work included."""
    finish(device)
    began = time.perf_counter()
    function()
    finish(device)
    return time.perf_counter() - began


def pair(off, on, device, seconds=3.0):
    """Median seconds of both, run in turn for about `seconds` and at least three times each, after a warm-up. → (off, on)"""
    times, end = [], time.perf_counter() + seconds + timed(off, device) + timed(on, device)
    while len(times) < 3 or time.perf_counter() < end and len(times) < 200:
        times.append((timed(off, device), timed(on, device)))
    return tuple(statistics.median(t) for t in zip(*times))


def one_core(*arguments):
    """pair with one CPU thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    result = pair(*arguments)
    torch.set_num_threads(threads)
    return result


def show(name, off, on, unit, limit=""):
    """One line of the table; the gain is a ratio of rates, or of times and bytes the other way round."""
    gain = on / off if unit.endswith("/s") else off / on if on else float("inf")
    print(
        f"| {name:58s} | {off:9.4g} | {on:9.4g} | {unit:9s} | {gain:6.2f} × | {limit:64s} |",
        flush=True,
    )


def matmul_peak(device, precision):
    """FLOP/s of the best of five large products: the limit of this machine, now."""
    n, dtype = 8192 if device.type == "cuda" else 3072, getattr(torch, precision)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / min(timed(lambda: a @ b, device) for _ in range(5))


def bandwidth(device):
    """Bytes/s, the best of scaling 512 MB in place and of a moving average over as much: read and written bytes counted."""
    a, parts = (
        torch.ones(1 << 27, device=device),
        [[torch.ones(1 << 20, device=device) for _ in range(64)] for _ in range(2)],
    )
    scale, average = (lambda: a.mul_(1.0)), (lambda: torch._foreach_lerp_(*parts, 0.5))
    return max(
        size / min(timed(f, device) for _ in range(5))
        for f, size in ((scale, 2 * a.nbytes), (average, 3 * 64 * 4 << 20))
    )


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
    changes = sorted(
        (e.start_ns(), e.nbytes())
        for e in seen.profiler.kineto_results.events()
        if e.name() == "[memory]"
    )
    return max(itertools.accumulate((size for _, size in changes), initial=0))


def waits(function, device):
    """How often a call makes the host wait for the device: reported by CUDA on a GPU; on a CPU, counted as the operations that would."""
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
    return sum(
        e.name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select")
        and not within(e, "aten::_fused_adamw_")
        for e in seen.events()
    )


def within(event, name):
    """Whether a profiler event happened inside another called `name`: AdamW's fused kernel for CPUs reads its step counts, the one for GPUs does not."""
    while event and event.name != name:
        event = event.cpu_parent
    return event is not None


# ------------------------------------------------------------------------------------------------ the step
class Counted(AblatedCheXWorld):
    """CheXWorld that predicts only the first `count` patches of the other view: it can be timed at the token counts of other programs."""

    def between(self, t, h, keep, coords, action):
        return super().between(t[:, : self.count], h, keep, coords[:, : self.count], action)


def made_up(config, device):
    """What CheXWorld.forward takes, with the wanted token counts, from noise."""
    generator, B, grid = (
        torch.Generator().manual_seed(0),
        config.batch,
        config.image // config.patch,
    )
    action = augment.sample_actions(2 * B, generator).to(device)
    y = torch.rand(2 * B, 1, config.image, config.image, generator=generator).to(device)
    order = torch.rand(2 * B, grid**2, generator=generator).argsort(1).to(device)
    boxes = torch.tensor(
        [[0.0, 0.0, 300.0, 300.0], [20.0, 40.0, 300.0, 300.0]], device=device
    ).repeat_interleave(B, 0)
    coords = augment.relative_coords(boxes, boxes.roll(B, 0), grid)
    keep, masked = (
        order[:, : config.visible],
        order[:, config.visible : config.visible + config.masked],
    )
    return dict(
        y=y,
        x=augment.apply_action(y, action),
        keep=keep,
        masked=masked,
        coords=coords,
        action=action,
    )


class Step:
    """pretrain.py's step on a made-up batch: forward, backward, clip, AdamW, moving average. step() → the losses, still on the device."""

    def __init__(self, config, team):
        torch.manual_seed(0)
        self.config, self.device = config, team.device
        self.world = Counted(config.image, config.patch, **SIZES[config.size]).to(team.device)
        self.world.count = config.targets
        self.checkpointing(config.checkpointing)
        self.trained = [p for p in self.world.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, weight_decay=0.05, fused=True)
        self.forward = torch.compile(self.world) if config.compile == "on" else self.world
        if team.world > 1:
            self.forward = DistributedDataParallel(self.forward, broadcast_buffers=False)
        self.batch = made_up(config, team.device)

    def checkpointing(self, on):
        self.world.encoder.save_memory = self.world.predictor.save_memory = on

    def __call__(self):
        with autocast(self.device, self.config.precision):
            losses = self.forward(**self.batch)
            losses["loss"].backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.world.update_target(0.996)
        return losses


# ------------------------------------------------------------------------------------------------ on paper
class Part(NamedTuple):
    """FLOPs of the matrix products, bytes these move, bytes that everything between them moves, in one step of one process."""

    name: str
    flops: float
    product_bytes: float = 0.0
    other_bytes: float = 0.0


# Bytes a token, block and unit of width that norms, GELU and residual sums move in the forward pass. Under autocast the residual stream is
# float32: each norm reads 4, writes 4 and is cast (6), each sum reads 6 and writes 4, GELU reads and writes 8. Compiled, these merge.
BETWEEN = {
    ("float32", False): 72,
    ("bfloat16", False): 64,
    ("float32", True): 64,
    ("bfloat16", True): 40,
}
# Bytes a token, block and unit of width kept for the backward pass: both ends of norms, GELU and attention, and what the products read.


KEPT = {"float32": 64, "bfloat16": 44}


def stack(name, config, tokens, dim, depth, passes, compiled):
    """Transformer blocks: 24 D² FLOPs a token for the products with weights, 4 L D for attention; 20 D numbers read and written."""
    many, size = passes * tokens * depth * dim, 2 if config.precision == "bfloat16" else 4
    return Part(
        name,
        many * (24 * dim + 4 * tokens),
        many * 20 * size,
        many * BETWEEN[config.precision, compiled],
    )


def count_parts(config, compiled=False):
    """A step part by part. A backward pass counts as two forward ones; what is computed again is not counted."""
    s, V, N, K = (
        SIZES[config.size],
        2 * config.batch,
        (config.image // config.patch) ** 2,
        config.visible,
    )
    D, d, low = s["dim"], s["predictor_dim"], config.precision == "bfloat16"
    trained, encoder = count_parameters(config)

    def predictor(name, L):
        blocks = stack(name, config, K + L, d, s["predictor_depth"], 3 * V, compiled)
        ends = 2 * D * d * (K + L) + 2 * L * (
            (d + 4) * d + 2 * d * d
        )  # into the width and back, policy network
        return blocks._replace(flops=blocks.flops + 3 * V * ends)

    return [
        Part(
            "patch projection", V * (2 * K + N) * 2 * config.patch**2 * D
        ),  # pixels need no gradient
        stack("context encoder", config, K, D, s["depth"], 3 * V, compiled),
        stack("target encoder", config, N, D, s["depth"], V, compiled),
        predictor("predictor, local", config.masked),
        predictor("predictor, global", config.targets),
        Part("weights to bfloat16", 0, 0, 6 * (trained + encoder) if low else 0),
        Part("gradient norm, AdamW", 0, 0, 40 * trained),
        Part("moving average", 0, 0, 12 * encoder),
    ]


def count_parameters(config):
    """Numbers that are trained, and numbers in one encoder."""
    with torch.device("meta"):
        world = CheXWorld(config.image, config.patch, **SIZES[config.size])
    return sum(p.numel() for p in world.parameters() if p.requires_grad), sum(
        p.numel() for p in world.encoder.parameters()
    )


def passes(config, tasks="local,global,domain", unified=True):
    """Tokens of a view in each forward pass that is trained: ([of the context encoder], [of the predictor])."""
    N, K, M = (config.image // config.patch) ** 2, config.visible, config.masked
    asked = {"local": (K, K + M), "global": (N, N + config.targets), "domain": (N, 2 * N)}
    tasks = set(tasks.split(","))
    if not unified:
        return [asked[t][0] for t in tasks], [asked[t][1] for t in tasks]
    K = K if "local" in tasks else N  # nothing is hidden without the local task
    return [K], [K + M] * ("local" in tasks) + [K + config.targets] * ("global" in tasks) or [2 * N]


def count_memory(config, checkpointing=False, tokens=None):
    """Bytes at the peak of a step → (weights, moments, gradients, moving average; what is kept for the backward pass). tokens: of `passes`."""
    s, V, kept = SIZES[config.size], 2 * config.batch, KEPT[config.precision]
    trained, encoder = count_parameters(config)
    seen, asked = tokens or passes(config)
    stacks = [(L, s["dim"], s["depth"]) for L in seen] + [
        (L, s["predictor_dim"], s["predictor_depth"]) for L in asked
    ]
    if checkpointing:  # each block's input, and all of one block
        activations = sum(4 * L * D * depth for L, D, depth in stacks) + max(
            kept * L * D for L, D, _ in stacks
        )
    else:
        activations = sum(kept * L * D * depth for L, D, depth in stacks)
    return 16 * trained + 4 * encoder + (
        2 * trained if config.precision == "bfloat16" else 0
    ), V * activations


def fitting(config, memory, checkpointing=False, tokens=None):
    """Films in one forward pass whose counted memory fills at most 70 % of a GPU with so many bytes (the count is a sixth too low, with
    checkpointing nearly a half: then 50 %). config.batch does not count."""
    fixed, film = count_memory(
        SimpleNamespace(**{**vars(config), "batch": 1}), checkpointing, tokens
    )
    return max(1, int(((0.5 if checkpointing else 0.7) * memory - fixed) / film))


class Chip(NamedTuple):
    """FLOP/s that large products reach, bytes/s and bytes of its memory, bytes/s of an all-reduce among 8 and among 64 (bus bandwidth)."""

    name: str
    peak: float
    speed: float
    memory: float
    links: tuple

    def seconds(self, part):
        """Roofline: products wait for arithmetic or for memory, whichever takes longer; what lies between them for memory alone."""
        return (
            max(part.flops / self.peak, part.product_bytes / self.speed)
            + part.other_bytes / self.speed
        )


REACH = 0.75  # of the data sheet's dense bfloat16 FLOP/s with float32 sums: an assumption, about what large products get


CHIPS = [
    Chip("H100 SXM", REACH * 989e12, 3.35e12, 80e9, (400e9, 300e9)),
    Chip("H200", REACH * 989e12, 4.8e12, 141e9, (400e9, 300e9)),
    Chip("RTX 4090", REACH * 165e12, 1.01e12, 24e9, (10e9, 5e9)),
]


def print_roofline(config):
    """The parts of a step on each chip, then memory, and what 8 and 64 of them reach, all on paper."""
    parts, fused = count_parts(config), count_parts(config, compiled=True)
    print(
        f"{config.size} ViT, {config.image}² px, {config.batch} films a GPU, {config.visible} visible, {config.masked} masked, "
        f"{config.targets} global targets, {config.precision}; milliseconds, products at {REACH:.0%} of the data sheet"
    )
    chips = "".join(f" {c.name:>9s} |" for c in CHIPS)
    print(f"| {'part':22s} | {'TFLOP':>7s} | {'GB':>7s} |{chips}\n|{'---|' * (3 + len(CHIPS))}")
    for name, rows in [(p.name, [p]) for p in parts] + [
        ("all, eager", parts),
        ("all, compiled", fused),
    ]:
        flops, moved = (
            sum(p.flops for p in rows),
            sum(p.product_bytes + p.other_bytes for p in rows),
        )
        times = "".join(f" {1e3 * sum(c.seconds(p) for p in rows):9.2f} |" for c in CHIPS)
        print(f"| {name:22s} | {flops / 1e12:7.2f} | {moved / 1e9:7.1f} |{times}")
    for chip in CHIPS:
        print_chip(chip, config, sum(chip.seconds(p) for p in fused), sum(p.flops for p in fused))


def print_chip(chip, config, step, flops):
    """Rate, memory and scaling of one kind of GPU; step: seconds. Gradients travel in buckets while the backward pass runs."""
    kept, lean = (sum(count_memory(config, on)) / 1e9 for on in (False, True))
    print(
        f"\n{chip.name}, compiled: {config.batch / step:,.0f} films/s a GPU, MFU {REACH * flops / step / chip.peak:.0%} of the data sheet; "
        f"memory {kept:.1f} GB, with checkpointing {lean:.1f}, of {chip.memory / 1e9:.0f}"
    )
    gradients = 4 * count_parameters(config)[0]
    for n, link in zip((8, 64), chip.links):
        reduce = 2 * (n - 1) / n * gradients / link
        late = max(0.0, reduce - 0.4 * step)  # about the share of a step that is backward pass
        print(
            f"  {n:2d} GPUs: all-reduce of {gradients / 1e6:.0f} MB {1e3 * reduce:.1f} ms at {link / 1e9:.0f} GB/s, step {1e3 * step:.0f} "
            f"ms: {n * config.batch / (step + late):,.0f} films/s, efficiency {step / (step + late):.0%} ({step / (step + reduce):.0%} "
            f"without overlap, {4 * step / (4 * step + reduce):.0%} so when 4 micro-batches share one: no_sync)"
        )
