"""The README tells the truth: its commands parse, its file:function references exist, the lines it quotes are in the files, its pictures are there."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.M | re.S)
COMMANDS = sorted(
    {
        line.split("#")[0].strip()
        for kind, block in BLOCKS
        if kind != "python"
        for line in block.splitlines()
        if re.search(r"\b\w+\.py\b", line)
    }
    | {c for c in re.findall(r"`((?:python|torchrun) [^`]*\.py[^`]*)`", README)}
)


def scripts_and_flags():
    """(script, flag) for every --flag that follows a script's name in a README command."""
    found = set()
    for command in COMMANDS:
        for part in command.split("&&"):
            called = re.search(r"(analyze\.py \w+|\w+\.py)(.*)", part)
            if called:
                found |= {(called[1], flag) for flag in re.findall(r"(--\w+)", called[2])} | {
                    (called[1], "--help")
                }
    return sorted(found)


def test_nothing_is_left_to_fill_in():
    assert "@@" not in README


def test_the_two_set_up_commands_stand_word_for_word():
    assert "pip install -r requirements.txt && python pretrain.py\n" in README
    assert "pip install -r requirements.txt -r tests/requirements.txt && pytest\n" in README


@pytest.fixture(scope="module")
def helps():
    """--help of every script that the README calls (and of data.py's sub-commands, which share one parser)."""
    texts = {}
    for script in {s for s, _ in scripts_and_flags()}:
        done = subprocess.run(
            [
                sys.executable,
                ROOT / script.split()[0],
                *script.split()[1:],
                *(["check"] if script == "data.py" else []),
                "--help",
            ],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, (script, done.stderr)
        texts[script] = done.stdout
    return texts


def test_every_flag_in_a_command_exists(helps):
    assert len(scripts_and_flags()) > 12
    for script, flag in scripts_and_flags():
        assert re.search(rf"{flag}\b", helps[script]), f"{script} has no {flag}"


def test_every_reference_exists():
    references = re.findall(r"`(\w+\.py):([\w.]+)`", README)
    assert len(references) > 15
    for file, name in references:
        source = (ROOT / file).read_text()
        for part in name.split("."):
            assert re.search(rf"^\s*(?:def|class) {part}\b", source, re.M), f"{file}:{name}"
    for file in set(re.findall(r"`(\w[\w/]*\.py)`", README)):
        assert (ROOT / file).is_file(), file


def test_quoted_lines_are_in_the_files():
    sources = "\n".join(p.read_text() for p in ROOT.glob("*.py"))
    squeeze = lambda line: re.sub(r"\s+", " ", line.split("#")[0]).strip()
    lines = {squeeze(line) for line in sources.splitlines()}
    quoted = [
        line
        for kind, block in BLOCKS
        if kind == "python"
        for line in block.splitlines()
        if line.strip()
    ]
    assert len(quoted) >= 5
    for line in quoted:
        assert squeeze(line) in lines, line


def test_pictures_are_there_and_small():
    for link in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README):
        assert (ROOT / link).is_file() and (ROOT / link).stat().st_size < 400_000, link
