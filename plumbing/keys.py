"""The keys of all random numbers but first weights, by the name of what they decide.

A key is a name from this list and the integers that the draw depends on, as (seed, epoch, film).
It holds no rank and no worker, so the same films meet the same numbers however many processes there
are. The name comes first: NumPy pads keys with zeros, so that without it (seed, epoch) would draw
the same numbers as (seed, epoch, 0).
"""

import numpy as np
import torch

# pre-training
VIEWS = 1  # (seed, epoch, film): the two boxes and flips of a film
ORDER = 2  # (seed, epoch): the order of the films
HOLD_OUT = 3  # (seed): films held out for the closing test
STEP = 4  # (seed, step): jitter, actions and masks of a global batch
# fine-tuning
TRAIN_VIEW = 5  # (seed, epoch, film): crop and flip of a training film
TRAIN_JITTER = 6  # (seed, step): brightness and contrast of a batch
DROP_PATH = 8  # (seed, step): which residual branches the films of a batch skip
DRAW_FRACTION = 11  # (draw): the training films of --fraction
DRAW_SHOTS = 12  # (draw): the order in which --shots looks for films of every class
SEED_DRAWS = 17  # (): the seeds that lab.ablation redraws beside the patients
DRAW_SPLIT = 16  # (patient's name): who of a table without splits is for test, who for val
BOOTSTRAP = 14  # (): the patients of every redraw that a 95 % interval is made of
# analyses
SURPRISE = 9  # (seed): the halves that judge each other
PROBE_FOLDS = 15  # (repeat): which patients are judged together, by a probe of the others
RANDOM_CUT = 10  # (seed): boxes of the correspondence test
DOMAIN_TEST = 13  # (seed, film): the actions of the domain sensitivity test
RCDM_PLACE = 20  # (seed, epoch, film): boxes and masked rectangles
RCDM_NOISE = 21  # (seed, step): time and noise of a training step
RCDM_PAINT = 22  # (seed, sample): the noise that a painting starts from
RCDM_SHOWN = 23  # (seed): which held-out films are shown
MARKER_PLACE = 24  # (seed, draw, film, setting, try): views, block and letter of a marker
MARKER_SPLIT = 25  # (seed): the patients that the marker probe learns from
# synthetic films: here the name comes last, as always, so that films stay what they were
PHANTOM_LABELS = 0  # (seed, patient): what the patient has
PHANTOM_SHAPE = 1  # (seed, patient): the anatomy, side and place of each finding
PHANTOM_FILM = 2  # (seed, film): scanner, pose, breath, exposure, noise
PHANTOM_SPLIT = 3  # (seed, patient): train, val or test
PHANTOM_MARKER = 4  # (seed, film): collimated edge and letter
# `trees` is a patient's own number; alone it is the key of the vessels
PHANTOM_GAS = 1  # (trees): gas in the gut
PHANTOM_TEXTURE = 2  # (trees): texture of the findings
PHANTOM_NODULES = 3  # (trees): number of the nodules, place and size of each


def numpy_rng(*key):
    """Make a NumPy generator that depends on the integers of `key`, each 0 or more, alone."""
    return np.random.default_rng(key)


def torch_generator(*key):
    """Make a torch generator, on the CPU, that depends on the integers of `key` alone."""
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1)
    return torch.Generator().manual_seed(int(seed))
