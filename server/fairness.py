"""Whom the model serves worst: each site's local accuracy, from the counts that it noised.

What a site released may be computed on: all of this is post-processing, and costs no privacy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from bract.shared.contract import Contract
from bract.shared.policy import evaluation_error
from bract.shared.privacy.receipts import Receipt
from bract.shared.reports.runs import LocalAccuracy


def of_round(receipts: Mapping[str, Receipt], agreed: Contract) -> LocalAccuracy:
    """Returns the local accuracies of one round, all None where no site was asked for any.

    Args:
        receipts: by site, of those that replied.
        agreed: says the noise and each site's nominal size, from which the errors come.
    """
    pairs = {
        name: receipt.evaluation
        for name, receipt in sorted(receipts.items())
        if receipt.evaluation is not None
    }
    asked = agreed.evaluation
    if asked is None or not pairs:
        return LocalAccuracy()
    each = {name: ratio(*pair) for name, pair in pairs.items()}
    worst = min(
        (name for name, value in each.items() if value is not None),
        key=lambda name: each[name] or 0.0,
        default=None,
    )
    correct, total = (math.fsum(column) for column in zip(*pairs.values(), strict=True))
    return LocalAccuracy(
        local_accuracy=ratio(correct, total),
        local_accuracy_worst=None if worst is None else each[worst],
        local_accuracy_worst_site=worst,
        local_accuracy_by_site=each,
        local_accuracy_error_by_site={
            site.name: evaluation_error(asked, site.nominal_size)
            for site in agreed.cohort
            if site.name in each
        },
    )


def ratio(correct: float, total: float) -> float | None:
    """Returns correct / total within [0, 1]; None where noise left no examples to divide by."""
    return min(max(correct / total, 0.0), 1.0) if total > 0 else None


def last(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns what the last line with local accuracies says of them, and its round."""
    for line in reversed(lines):
        if line.get("local_accuracy_by_site") is not None:
            found = {name: line[name] for name in LocalAccuracy.model_fields}
            return {**found, "local_accuracy_round": line["round"]}
    return {}
