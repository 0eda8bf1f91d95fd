"""plumbing.monitor"""

import torch

from plumbing.metrics import feature_std, rankme

LOSSES = [
    "l11",
    "l22",
    "l12",
    "l21",
    "d11",
    "d22",
]  # d: the separate domain losses of --not_unified


def collect_health(features, team):
    """feature_std and RankMe of the pooled target features of the whole step. (n, D) on each rank → two floats"""
    if team.world > 1:
        parts = [torch.empty_like(features) for _ in range(team.world)]
        torch.distributed.all_gather(parts, features.contiguous())
        features = torch.cat(parts)
    features = features.float().cpu()
    return feature_std(features), rankme(features)


def warn_of_collapse(std, rank, step, total, bar):
    """Say what to do when the target features lose their variety; early steps are always poor, so only after a tenth of the training."""
    if step > total / 10 and (std < 0.02 or rank < 1.5):
        bar.write(
            f"warning: step {step}: the features collapse (std {std:.3f}, RankMe {rank:.1f}): lower --lr, raise --ema or lengthen --warmup; python analyze.py health tells more"
        )
