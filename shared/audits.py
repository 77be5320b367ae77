"""What the audit of a mechanism leaves behind, as JSON: what was claimed, tested and found."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from bract.shared.configuration import Frozen

Probability = Annotated[float, Field(ge=0, le=1)]


class MechanismParameters(Frozen):
    """What a mechanism does in a round; null where the audit could not tell.

    `steps` are the local steps of the contract that has more than one.
    """

    noise_multiplier: float | None
    clip_norm: float | None
    sampling_rate: float | None
    steps: float | None


class MechanismCheck(Frozen):
    """One test: the probability of as much, were the claim true, and what else is taken as given.

    A p-value of 0 or 1 is that of a fact, as an array too many in a message.
    """

    name: str
    setting: str
    site: str
    given: str
    p: Probability
    passed: bool


class FoundRate(Frozen):
    """How many canaries are found at a rate of false alarms, with a 95 % interval.

    Null where so few strangers make less than ten false alarms of it.
    """

    false_positive_rate: Probability
    true_positive_rate: Probability | None
    low: Probability | None
    high: Probability | None
    strangers: int


class MechanismAudit(Frozen):
    """`bract audit experiment`: canaries through the client path of an experiment's model.

    `recovered_error` holds the standard errors of what was recovered.
    `p_values` are those of `checks` by setting, site and name; a test fails under `threshold`.
    `epsilon_ledger` is what the dearest site's ledger says of the contract `main`, at `delta`;
    `epsilon_claimed` what that contract says, `epsilon_recovered` what the recovered parameters
    would cost. `epsilon_lower` holds lower bounds by method and confidence, 0 where δ alone leaves
    as much doubt; nothing is decided by them.
    """

    experiment: str
    mechanism: Literal["dp-sgd"] = "dp-sgd"
    model: str
    data: str
    made_up: bool
    grid: Literal["in-process", "loopback"]
    passed: bool
    recovered: MechanismParameters
    recovered_error: MechanismParameters
    claimed: MechanismParameters
    p_values: dict[str, Probability]
    checks: list[MechanismCheck]
    failed: list[str]
    threshold: Probability
    epsilon_ledger: float | None
    epsilon_claimed: float
    epsilon_recovered: float | None
    epsilon_lower: dict[str, dict[str, float]]
    delta: float
    true_positive_rates: list[FoundRate]
    canaries: int
    sites: int
    rounds: int
    seed: int
    seconds: float
    not_checked: list[str]
    versions: dict[str, str]
