"""The pictures of docs/ in one command, of synthetic films, which may be shown.

    python -m lab.gallery --weights runs/demo --data runs/demo/phantoms/films

Runs every analysis that draws and trains the two RCDM decoders, each in its folder under --out,
then writes the pictures into --docs as FOLDER_PICTURE.png. A decoder resumes where it stopped. Not
among them: few_films.png, which python -m lab.ablation compare --shots draws as curve.png.
"""

import dataclasses
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from PIL import Image

from lab.common import start
from plumbing import pictures
from plumbing.launch import UserError, flag, run_script

ANALYSES = ("domain", "correspondence", "health", "surprise", "markers", "letters")
PAGES = {  # folder: its pictures
    "views": ["views"],
    "domain": ["choices", "errors"],
    "correspondence": ["maps"],
    "health": ["health"],
    "surprise": ["surprise"],
    "markers": ["examples"],
    "letters": ["paintings"],
    "rcdm-local": ["samples"],
    "rcdm-global": ["samples"],
}

LARGE = 400_000  # bytes of a picture


@dataclasses.dataclass
class Config:
    weights: str = flag(None, "a run or its last.pt, the authors' file [newest run below runs/]")
    data: str = flag(None, "films for lab.rcdm [the run's]; all else looks at synthetic ones")
    out: str = flag(None, "folder of all results [runs/gallery]")
    docs: str = flag("docs", "folder of the pictures")
    steps: int = flag(None, "training steps of each of the two RCDM decoders [lab.rcdm's]")
    seed: int = flag(0, "of everything random")
    device: str = flag("auto", "auto, cpu, cuda, cuda:1 or mps")


def main(argv=None):
    args, _ = start(Config, __doc__, "gallery", argv)
    out = Path(args.out)
    common = ["--seed", str(args.seed), "--device", args.device]
    run("views", *common, "--out", str(out / "views"))
    common += ["--weights", args.weights]
    for name in ANALYSES:
        run(name, *common, "--out", str(out / name))
    for mode in ("local", "global"):
        words = [*common, "--mode", mode, "--out", str(out / f"rcdm-{mode}")]
        if args.steps:
            words += ["--steps", str(args.steps)]
        if args.data:
            words += ["--data", args.data]
        run("rcdm", *words)
    collect(out, Path(args.docs))
    print(f"\npictures {args.docs}/*.png, numbers {out}/*/result.json")


def run(name, *words):
    """Print and run `python -m lab.NAME WORDS` as a process of its own."""
    command = ["-m", f"lab.{name}", *words]
    print(f"\npython {shlex.join(command)}", flush=True)
    if subprocess.run([sys.executable, *command]).returncode:
        raise UserError(f"lab.{name} failed (above); once that is mended, the same command resumes")


def collect(out, docs):
    """Copy all pictures to `docs`; large ones, of heat maps, with 256 colours: fewer lose lines."""
    docs.mkdir(parents=True, exist_ok=True)
    for folder, names in PAGES.items():
        for name in names:
            page = out / folder / f"{name}.png"
            copy = shutil.copy(page, docs / f"{folder}_{name}.png")
            if page.stat().st_size > LARGE:
                pictures.save(Image.open(page).convert("RGB").quantize(256), copy)


if __name__ == "__main__":
    run_script(main)
