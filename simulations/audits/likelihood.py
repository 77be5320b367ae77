"""Membership by reference models: LiRA's online form (Carlini et al. 2022, arXiv 2112.03570)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from bract.simulations.audits.roc import Floats

MODELS_FOR_OWN_SPREAD = 64  # under it, as in the paper, all examples share one
_LEAST_SPREAD = 1e-6


def confidence(outputs: Floats, targets: npt.NDArray[np.int64]) -> Floats:
    """Returns log(p / (1 − p)) of each example's own class, by which scores are about normal.

    Args:
        outputs: (examples, classes), before the softmax.
        targets: (examples,), classes.

    Example:
        >>> confidence(np.array([[0.0, 2.0]]), np.array([1])).tolist()
        [2.0]
    """
    rows = np.arange(len(targets))
    own = outputs[rows, targets].astype(np.float64)
    rest = np.array(outputs, dtype=np.float64)
    rest[rows, targets] = -np.inf
    greatest = rest.max(axis=1)
    others = greatest + np.log(np.exp(rest - greatest[:, None]).sum(axis=1))
    difference: Floats = own - others
    return difference


def ratios(confidences: Floats, member: npt.NDArray[np.bool_]) -> Floats:
    """Returns each model's log-likelihood ratio for each example, by all other models.

    log N(φ; μ_in, σ_in²) − log N(φ; μ_out, σ_out²): the model that is attacked is never among its
    own references.

    Args:
        confidences: (models, examples), φ.
        member: (models, examples), whether the model was trained on the example. By independent
            coins: halves of a fixed size would tell of the model that is left out.
    """
    of_in, of_out = _left_out(confidences, member), _left_out(confidences, ~member)
    if len(confidences) < MODELS_FOR_OWN_SPREAD:
        spreads = _common_spread(confidences, member), _common_spread(confidences, ~member)
    else:
        spreads = of_in[1], of_out[1]
    found: Floats = _log_normal(confidences, of_in[0], spreads[0]) - _log_normal(
        confidences, of_out[0], spreads[1]
    )
    return found


def _left_out(confidences: Floats, chosen: npt.NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """Returns mean and deviation of an example over the chosen models but one, for each one."""
    values = np.where(chosen, confidences, 0.0)
    count = chosen.sum(axis=0) - chosen
    total = values.sum(axis=0) - values
    # An example that no other such model knows: its mean is that of all.
    mean = np.where(count > 0, total / np.maximum(count, 1), values.sum() / chosen.sum())
    squares = np.square(values).sum(axis=0) - np.square(values)
    variance = np.maximum(squares / np.maximum(count, 1) - np.square(mean), 0.0)
    return mean, np.sqrt(variance)


def _common_spread(confidences: Floats, chosen: npt.NDArray[np.bool_]) -> Floats:
    """Returns the deviation around each example's mean, over all examples."""
    count = chosen.sum(axis=0)
    mean = np.where(chosen, confidences, 0.0).sum(axis=0) / np.maximum(count, 1)
    squares = np.where(chosen, np.square(confidences - mean), 0.0).sum()
    return np.full((1, 1), np.sqrt(squares / max(int((count - 1).clip(0).sum()), 1)))


def _log_normal(values: Floats, mean: Floats, spread: Floats) -> Floats:
    safe = np.maximum(spread, _LEAST_SPREAD)
    found: Floats = -np.square((values - mean) / safe) / 2 - np.log(safe)
    return found
