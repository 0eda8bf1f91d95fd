"""lab.gallery"""

import dataclasses
import shlex
import subprocess
import sys
from pathlib import Path

from PIL import Image

from lab import correspondence, domain, health, surprise, views
from lab.common import Common, find_weights, run_command
from plumbing import pictures
from plumbing.launch import UserError, flag, run_script


# ------------------------------------------------------------------------------------------------ gallery
@dataclasses.dataclass
class Config:
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


def command(config, device):
    """Every analysis on synthetic films, which may be shown, and the two RCDM decoders; then all pictures, made small, into --docs as FOLDER_PICTURE.png."""
    weights, out, docs = str(find_weights(config)), Path(config.out), Path(config.docs)
    for module in (views, domain, correspondence, health, surprise):
        name = module.__name__.removeprefix("lab.")
        (out / name).mkdir(parents=True, exist_ok=True)
        print(f"\n{name}", flush=True)
        Own = getattr(module, "Config", Common)
        module.command(Own(weights=weights, out=str(out / name), seed=config.seed), device)
    for mode in ("local", "global"):
        words = [
            sys.executable,
            "-m",
            "lab.rcdm",
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
            raise UserError(f"lab.rcdm --mode {mode} failed (above); the same command goes on")
    docs.mkdir(parents=True, exist_ok=True)
    for folder, names in PAGES.items():
        for name in names:
            page = Image.open(out / folder / f"{name}.png").convert("RGB")
            pictures.save(page.quantize(64), docs / f"{folder}_{name}.png")
    print(f"\npictures {docs}/*.png, numbers {out}/*/result.json")


if __name__ == "__main__":
    run_script(lambda: run_command(Config, command, "gallery"))
