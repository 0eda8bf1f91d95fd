"""The closing table: what is printed and what is written."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lab_for_tests import TINY, Films, noise
from PIL import Image

from lab import report
from model import CheXWorld
from plumbing import own_table


def make_labels(tmp_path, text):
    (tmp_path / "table.csv").write_text(text)
    return own_table.Labels(tmp_path / "table.csv")


@pytest.mark.slow
def test_the_closing_table_is_printed_and_written(tmp_path, capsys):
    torch.manual_seed(0)
    world = CheXWorld(**TINY)
    films = Films({f"{i}.png": noise(i) if i != 4 else None for i in range(40)})
    split = ["train", "val", "test"]
    lines = [f"{i}.png,{'x' if i // 3 % 2 else 'normal'},{split[i % 3]}\n" for i in range(40)]
    labels = make_labels(tmp_path, "filename,label,split\n" + "".join(lines))
    (tmp_path / "log.csv").write_text("step,l11,l22,l12,l21,rankme\n1,1,2,3,4,\n2,1,2,3,4,5\n")
    args = SimpleNamespace(seed=0, image=64, weights=None)
    report.closing(args, tmp_path, world, films, np.array([3, 4]), [labels], "cpu")
    words = capsys.readouterr().out
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["domain"]["images"] == 1  # the other film cannot be read
    assert {"pre-trained", "random initialisation", "raw 64² pixels"} < set(
        result["probe"]["table"]
    )
    part = result["probe_intervals"]["table"]["test"]
    assert part["values"] == result["probe"]["table"] and part["films"] == 13
    assert "films of test were not seen in pre-training" in words
    for way in ("action", "no_action", "random"):
        assert f"Recall@5 {result['domain'][way]['recall@5']:6.2f}" in words
    for name, value in result["probe"]["table"].items():
        assert f"{name:28s}  {value:7.1f}" in words
    assert Image.open(tmp_path / "curve.png").height > 600
    args.weights = "encoder.pt"
    report.closing(args, tmp_path, world, films, np.array([], int), [labels], "cpu")
    words = capsys.readouterr().out
    assert "what --weights had seen is unknown" in words and "not seen in pre" not in words
    report.closing(args, tmp_path, world, films, np.array([], int), [], "cpu")
    assert json.loads((tmp_path / "result.json").read_text()) == {
        "domain": {},
        "probe": {},
        "probe_intervals": {},
    }
