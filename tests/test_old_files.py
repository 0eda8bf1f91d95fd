"""Files that version 0.1 wrote still load and compute what they computed then.

tests/old was made by the program as it was at commit 101e072: a run's last.pt and
encoder.pt, one of an ablated run, two fine-tuned checkpoints, a packed file, and expected.npz with
what the old program made of them for `IMAGES`.
"""

import gzip

import numpy as np
import pytest
import torch
from conftest import TESTS

import finetune
from plumbing.checkpoint import BadCheckpoint
from plumbing.launch import UserError
from plumbing.pack import Pack
from plumbing.seedrun import load_best
from plumbing.weights import load_encoder, load_world

OLD = TESTS / "old"
IMAGES = torch.linspace(0, 1, 2 * 32 * 32).view(2, 1, 32, 32)
ACTION = torch.tensor([[1.2, 0.8, 0.7, 1.0], [1, 1, 1, 0]])


@pytest.fixture
def old(tmp_path):
    """The path of an unzipped checkpoint."""

    def unzip(name):
        path = tmp_path / name
        path.write_bytes(gzip.decompress((OLD / f"{name}.gz").read_bytes()))
        return path

    return unzip


@pytest.fixture(scope="module")
def expected():
    return np.load(OLD / "expected.npz")


def assert_same(computed, expected):
    assert np.abs(computed.detach().numpy() - expected).max() < 1e-5


def test_an_old_run_loads_as_a_world(old, expected):
    world = load_world(old("run_last.pt")).eval()
    assert_same(world.predict(IMAGES, ACTION), expected["prediction"])
    assert not {"tasks", "delta", "action", "unified"} & world.config.keys()


def test_an_old_encoder_loads(old, expected):
    assert_same(load_encoder(old("run_encoder.pt")).eval()(IMAGES), expected["target"])
    assert_same(load_encoder(old("run_last.pt")).eval()(IMAGES), expected["target"])
    assert_same(load_encoder(old("run_last.pt"), "context").eval()(IMAGES), expected["context"])


def test_an_old_ablated_run_is_told_apart(old):
    path = old("ablated_last.pt")
    with pytest.raises(BadCheckpoint, match="lab.ablation"):
        load_world(path)
    assert load_encoder(path)(IMAGES).isfinite().all()


def test_an_old_classifier_loads(old, expected):
    saved = load_best(old("best_labels.pt"))
    assert (saved["kind"], saved["labels"]) == ("labels", ["a", "b"])
    model = finetune.make_finetuned(saved, torch.device("cpu"))
    assert_same(model(IMAGES), expected["best_labels"])


def test_an_old_segmentation_is_refused_in_one_line(old):
    """Its decoder had three stages. Its encoder can still be fine-tuned again."""
    path = old("best_mask.pt")
    with pytest.raises(UserError, match="best_mask.pt holds another network") as error:
        finetune.make_finetuned(load_best(path), torch.device("cpu"))
    assert "\n" not in str(error.value)
    assert load_encoder(path).config["depth"] > 0


def test_an_old_pack_opens(expected):
    pack = Pack(OLD / "films.pack")
    assert len(pack) == 3
    for k, name in enumerate(pack.names):
        assert name == f"{k}.png" and np.array_equal(pack.verified(k), expected[f"film{k}"])
