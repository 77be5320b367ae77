"""What a run leaves behind: its summary, a line of its metrics, and what they share."""

from __future__ import annotations

import math
from typing import Annotated, Any, Final, Literal

from pydantic import Field

from bract.shared import versions
from bract.shared.configuration import Frozen
from bract.shared.contract import Contract
from bract.shared.terms import Hex32

GUARANTEE_PRIVATE: Final = "(ε, δ)-DP per example"
GUARANTEE_SIMULATION: Final = "none: simulation"
GUARANTEE_UNPROTECTED: Final = "none: unprotected"
Guarantee = Literal["none: simulation", "none: unprotected", "(ε, δ)-DP per example"]
# What each score is called where a person reads it.
SCORES: Final = {
    "test_accuracy": "accuracy",
    "test_accuracy_mean_of_groups": "accuracy, mean of the groups",
    "precision": "precision, macro",
    "recall": "recall, macro",
    "f1": "F1, macro",
    "auc": "area under the ROC curve",
    "test_loss": "loss",
    "test_perplexity": "perplexity of a token",
    "test_mean_squared_error": "mean squared error",
    "test_mean_absolute_error": "mean absolute error",
    "test_r2": "R²",
}
Probability = Field(ge=0, le=1)
_ROUNDING = 1e-2


class RefusedRound(Frozen):
    """A site's refusal of one round."""

    site: str
    round: int
    reason: str


class LedgerHead(Frozen):
    """The last entry of a site's ledger: an anchor for `bract audit verify`."""

    domain: str
    sequence: int
    hash: str


class SitePrivacy(Frozen):
    """One site's ε: its ledger's total for the domain, and this run's; null where unbounded."""

    epsilon: float | None
    epsilon_run: float | None
    unbounded: bool
    charges: int
    domain: str


class Scores(Frozen):
    """How good the last weights are on public test examples.

    Of the task "classes" there is what tells classes apart; `auc` is the area under the ROC curve,
    the mean of each class against the rest where there are more than two, and null where one of
    them is missing. Of "next-token" accuracy and loss are those of a token, and the perplexity is
    exp(loss). Of "value" the loss is the mean squared error as the model learns it; the errors
    below are in the file's own unit, where a table's target says its bounds. What the task has not
    is null, and so are the figures of groups where the data set knows none.
    """

    test_accuracy: Annotated[float, Probability] | None
    test_loss: float | None
    test_perplexity: float | None = None
    test_mean_squared_error: float | None = None
    test_mean_absolute_error: float | None = None
    test_r2: float | None = None
    precision: Annotated[float, Probability] | None = None
    recall: Annotated[float, Probability] | None = None
    f1: Annotated[float, Probability] | None = None
    confusion: list[list[int]] | None = None
    auc: Annotated[float, Probability] | None = None
    test_accuracy_by_group: dict[str, Annotated[float, Probability]] | None = None
    test_accuracy_mean_of_groups: Annotated[float, Probability] | None = None
    test_auc_by_group: dict[str, Annotated[float, Probability] | None] | None = None

    def departures(self, said: Scores) -> list[str]:
        """Returns the figures that are not what an earlier report of the same weights said.

        A hundredth is rounding: another device decides one answer of some hundreds otherwise. What
        the report does not say is passed over, and so are the confusion matrix, of which other
        figures come, and figures by group, where one answer is much.
        """
        by_group = {"test_accuracy_by_group", "test_auc_by_group"}
        names = Scores.model_fields.keys() - {"confusion", *by_group}
        return sorted(n for n in names if not _is_as_said(getattr(self, n), getattr(said, n)))

    @property
    def line(self) -> str:
        """The scores that there are, in words."""
        named = {
            "test accuracy": self.test_accuracy,
            "macro F1": self.f1,
            "AUC": self.auc,
            "perplexity": self.test_perplexity,
            "test loss": self.test_loss if self.test_accuracy is None else None,
            "mean absolute error": self.test_mean_absolute_error,
            "R²": self.test_r2,
        }
        return "   ".join(f"{name} {v:.4f}" for name, v in named.items() if v is not None)


class LocalAccuracy(Frozen):
    """How right the weights that a round began with are on the sites' own examples.

    From counts that each site noised and charged, so that all of it may be known; `local_accuracy`
    is over all sites that replied, the others are each site's own, within [0, 1]. The
    errors are the standard errors that the noise gives, at the most: among many sites the worst
    looks worse than it is by a few of them. A site is null where noise left it no examples; all
    is null where the contract asks for none.
    """

    local_accuracy: Annotated[float, Probability] | None = None
    local_accuracy_worst: Annotated[float, Probability] | None = None
    local_accuracy_worst_site: str | None = None
    local_accuracy_by_site: dict[str, Annotated[float, Probability] | None] | None = None
    local_accuracy_error_by_site: dict[str, float] | None = None


class Traffic(Frozen):
    """Bytes of arrays as they travel, without headers: what a site is sent, and what it sends."""

    weights_bytes: int | None = None
    update_bytes: int | None = None


class RunFacts(Scores, LocalAccuracy, Traffic):
    """What is known of a run on either side of the network.

    Local accuracy is that of the last round which asked for it, `local_accuracy_round`; bytes are
    those of one site in one round. `model_sha256` is that of model.safetensors, which the scores
    are of; null in a summary of before it was told. Where only `rows_kept` of a person are used, ε
    of an example is that of a person with no more; of one with more another row takes an example's
    place, at `epsilon_replaced`.
    """

    local_accuracy_round: int | None = None

    run: str
    epsilon_run: float | None
    delta: float
    adjacency: str
    unit: Literal["example", "client"]
    mechanism: str
    noise_multiplier: float
    sampling_rate: float
    clip_norm: float
    sites: int
    refused: list[RefusedRound]
    heads: dict[str, LedgerHead]
    rounds: int
    seconds: float
    versions: dict[str, str]
    contract_sha256: str
    guarantee: Guarantee
    out: str
    rows_per_person: int | None = None
    epsilon_person: float | None = None
    rows_kept: int | None = None
    epsilon_replaced: float | None = None
    model_sha256: Hex32 | None = None


class Summary(RunFacts):
    """summary.json: one run, with what its ledgers prove.

    `epsilon` is of one example; `epsilon_person` bounds that of a person with `rows_per_person`
    examples, as every contract in the ledgers bounds them; both are null where one does not.
    """

    epsilon: float | None
    epsilon_prv: float | None
    unbounded: bool
    per_site: dict[str, SitePrivacy]
    device: str
    workers: int


class MetricsLine(LocalAccuracy, Traffic):
    """A line of metrics.jsonl: one completed round, scored on public validation examples."""

    round: int
    validation_accuracy: Annotated[float, Probability] | None
    validation_loss: float | None
    validation_perplexity: float | None = None
    epsilon_run: float | None
    replied: int
    refused: int


class ServerSummary(RunFacts):
    """summary.json of a real run, as far as a server can know it.

    `epsilon_run` is what a site that served every attempt has spent in this run, and what receipts
    tell of orders that a killed site took up anew; `epsilon_person` the same of a person with
    `rows_per_person`. What its ledger holds beside it is the site's own affair.
    """


class Repeats(Frozen):
    """Test accuracies, each the mean over the groups' test sets, of runs that know no other."""

    accuracies: list[Annotated[float, Probability]]
    mean: float = Probability
    deviation: float | None


class FederationSummary(Summary):
    """What an example of a real federation prints: its last run, by the sites' own ledgers.

    `plain_accuracy` is the test accuracy of a simulation without privacy on the same data.
    """

    plain_accuracy: float = Probability
    plain_accuracy_mean_of_groups: Annotated[float, Probability] | None
    repeats: Repeats


def _is_as_said(found: object, said: object) -> bool:
    if isinstance(found, dict) and isinstance(said, dict):
        return all(_is_as_said(found.get(name), value) for name, value in said.items())
    if isinstance(found, float) and isinstance(said, float):
        return math.isclose(found, said, rel_tol=_ROUNDING, abs_tol=_ROUNDING)
    return said is None or found == said


def facts_of(agreed: Contract) -> dict[str, Any]:
    """Returns what a report of a run takes from its contract and from this installation."""
    privacy = agreed.privacy
    return {
        "run": agreed.run,
        "adjacency": privacy.adjacency,
        "unit": privacy.unit,
        "rows_per_person": agreed.data.rows_per_person,
        "mechanism": privacy.mechanism,
        "noise_multiplier": privacy.noise_multiplier,
        "sampling_rate": privacy.sampling_rate,
        "clip_norm": privacy.clip_norm,
        "sites": len(agreed.cohort),
        "versions": versions.installed(),
        "contract_sha256": agreed.sha256,
    }
