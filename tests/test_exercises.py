"""Every exercise of docs/exercises.md runs: its command as it stands, cut to a few steps."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

PAGE = (ROOT / "docs" / "exercises.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^python .*$", PAGE, re.M)
SHORT = {
    "pretrain": "--phantoms 24 --image 32 --max_steps 2 --batch 4 --device cpu --workers 0",
    "lab.probe": "--films 40 --device cpu",
}


@pytest.fixture(scope="module")
def code(tmp_path_factory):
    """A copy of the program, in which exercise 3 may change a file."""
    folder = tmp_path_factory.mktemp("exercises")
    for file in ROOT.glob("*.py"):
        shutil.copy(file, folder)
    for part in ("plumbing", "lab"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def run(code, command):
    """Run a command of the page in the copy. → what it prints"""
    kind = "lab.probe" if "lab.probe" in command else "pretrain"
    words = [sys.executable, *command.split()[1:], *SHORT[kind].split()]
    environment = os.environ | {"PYTHONPATH": str(code)}
    done = subprocess.run(words, cwd=code, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"
    return done.stdout


def apply_changes(code, page):
    """Make the changes of the page's diff blocks: each line with - becomes the one with + below."""
    count = 0
    for file, block in re.findall(r"`(\w+\.py):\w+`[^`]*```diff\n(.*?)```", page, re.S):
        text = (code / file).read_text(encoding="utf-8")
        for old, new in re.findall(r"^-(.*)\n\+(.*)$", block, re.M):
            assert text.count(old + "\n") == 1, f"{file} has no line {old}"
            text = text.replace(old, new)
            count += 1
        (code / file).write_text(text, encoding="utf-8")
    return count


@pytest.mark.slow
def test_every_exercise_runs(code):
    assert len(COMMANDS) == 8  # the run that all are compared with, then 1 to 6, of which 4 has two
    printed = {}
    for command in COMMANDS:
        if "one_block" in command:
            assert apply_changes(code, PAGE) == 2
        printed[command] = run(code, command)
        if "one_block" in command:
            shutil.copy(ROOT / "masks.py", code)
    assert sum("Recall@5" in text for text in printed.values()) == 6  # not of pixels, nor of probe
    assert all("cells" in text for text in printed.values())
    views = [(code / "runs" / name / "views.png").read_bytes() for name in ("base", "one_block")]
    assert views[0] != views[1]  # the change reached the masks
