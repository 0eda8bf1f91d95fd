"""The bookkeeping of one seed of fine-tuning."""

from plumbing.seedrun import Best


def test_a_tie_on_validation_goes_to_the_lower_loss():
    best = Best()
    assert best.update(80.0, 0.6, 5)
    assert best == Best(value=80.0, loss=0.6, step=5, stale=0)
    assert not best.update(80.0, 0.7, 6)
    assert best == Best(value=80.0, loss=0.6, step=5, stale=1)
    assert best.update(80.0, 0.5, 7)
    assert best == Best(value=80.0, loss=0.5, step=7, stale=0)


def test_an_undefined_metric_is_no_progress():
    best = Best(value=80.0, loss=0.6, step=5)
    assert not best.update(float("nan"), 0.1, 6)
    assert best.stale == 1
