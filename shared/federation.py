"""FEDERATION.toml: what a coordinator proposes, and how its server runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator, model_validator

from bract.shared import contract as contracts
from bract.shared import keys, node_keys
from bract.shared.configuration import Frozen, HostPort, host_and_port, parse, read_toml
from bract.shared.contract import Contract, SignedContract
from bract.shared.data import public
from bract.shared.data.choice import DataChoice
from bract.shared.data.locations import folder_of
from bract.shared.errors import UsageError
from bract.shared.policy import check_delta
from bract.shared.privacy import entries
from bract.shared.privacy.calibration import check_budget, noise_within, rate_of
from bract.shared.privacy.orders import best_order
from bract.shared.terms import (
    GREATEST_NOISE,
    LEAST_NOISE,
    DataTerms,
    Delta,
    EvaluationTerms,
    Hex32,
    ModelTerms,
    Name,
    PrivacyTerms,
    SiteTerms,
    TrainingTerms,
    check_evaluation,
)

Seconds = Annotated[float, Field(gt=0)]


class ServerSettings(Frozen):
    """Where the server listens, and its files; relative paths are beside the TOML file.

    `greatest_reply_mib` bounds one site's answer, `state` holds the link state, `out` the run.
    """

    listen: HostPort
    certificate: str
    key: str
    witness_key: str
    state: str = "state"
    out: str
    public_data: str | None = None
    greatest_reply_mib: int = Field(default=1024, ge=1)

    @property
    def host(self) -> str:
        """The address to listen on."""
        return host_and_port(self.listen)[0]

    @property
    def port(self) -> int:
        """The port to listen on."""
        return host_and_port(self.listen)[1]


class Deadlines(Frozen):
    """How long the server waits, in seconds.

    `gather`: for the whole cohort before the first round; `sites`: for enough sites to be connected
    before a round; `round`: for all answers of a round;
    `reply`: for one site's answer once it has its order; `close`: for the last exchange.
    """

    gather: Annotated[float, Field(ge=0)] = 60.0
    sites: Seconds = 3600.0
    round: Seconds = 1800.0
    reply: Seconds = 900.0
    close: Seconds = 30.0


class FederatedPrivacy(Frozen):
    """What the run may cost a site; σ is calibrated to ε, evaluations included, unless it is given.

    `batch` is the expected batch at a site of mean nominal size. `ceiling` is the sites' own limit
    where they tell it: σ is raised until the whole run fits under it by the Rényi filter. Of a σ
    under 0.1 ε is in the tens of thousands, and takes gigabytes to be told.
    """

    epsilon: float = Field(gt=0)
    delta: Delta
    clip_norm: float = Field(gt=0)
    batch: float = Field(gt=0)
    noise_multiplier: float | None = Field(default=None, ge=LEAST_NOISE, le=GREATEST_NOISE)
    ceiling: float | None = Field(default=None, gt=0)


class SiteEntry(Frozen):
    """One site, as `bract keys site` prints it."""

    name: Name
    key: Hex32
    node_key: str
    domain: Name
    nominal_size: int = Field(ge=1)

    @field_validator("node_key")
    @classmethod
    def _without_its_comment(cls, node_key: str) -> str:
        # One key under two comments is one key; two sites with it would be one node.
        try:
            return node_keys.public_line(node_keys.public(node_key))
        except UsageError as error:
            raise ValueError(str(error)) from error


class AuditorEntry(Frozen):
    """One auditor, as `bract keys auditor` prints it."""

    name: Name
    certificate_sha256: Hex32


class AuditSettings(Frozen):
    """Where the server answers auditors.

    `authority` signs their certificates; without it, who issued the server's own.
    """

    listen: HostPort
    authority: str | None = None


class Federation(Frozen):
    """A whole FEDERATION.toml.

    `minimum_cohort`: with fewer answers a round is void. `spare_attempts`: what void and crashed
    rounds may cost beside `rounds`. `init_seed` makes the public start of the model.
    """

    run: Name
    coordinator_key: str
    contract: str = "contract.json"
    rounds: int = Field(ge=1, le=1_000_000)
    spare_attempts: int = Field(default=2, ge=0, le=1_000_000)
    minimum_cohort: int = Field(default=1, ge=1)
    init_seed: int = Field(default=0, ge=0, lt=2**63)
    server: ServerSettings
    deadlines: Deadlines = Deadlines()
    model: ModelTerms
    data: DataChoice
    training: TrainingTerms
    privacy: FederatedPrivacy
    evaluation: EvaluationTerms | None = None
    sites: tuple[SiteEntry, ...] = Field(min_length=1)
    auditors: tuple[AuditorEntry, ...] = ()
    audit: AuditSettings | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Federation:
        check_evaluation(self.evaluation, self.rounds)
        if self.evaluation is not None and self.evaluation.noise_multiplier < LEAST_NOISE:
            raise ValueError(
                f"evaluation.noise_multiplier {self.evaluation.noise_multiplier:g} must be "
                f"{LEAST_NOISE:g} or more"
            )
        if self.minimum_cohort > len(self.sites):
            raise ValueError(
                f"minimum_cohort {self.minimum_cohort} is over the {len(self.sites)} sites listed"
            )
        for what in ("name", "key", "node_key"):
            values = [getattr(site, what) for site in self.sites]
            twice = next((value for value in values if values.count(value) > 1), None)
            if twice is not None:
                raise ValueError(f"two sites have the {what} {twice[:60]!r}; list each site once")
        shown = [auditor.certificate_sha256 for auditor in self.auditors]
        twice = next((one for one in shown if shown.count(one) > 1), None)
        if twice is not None:
            raise ValueError(f"two auditors have the certificate {twice}; list each once")
        if self.audit is not None and not self.auditors:
            raise ValueError(
                "[audit] answers listed auditors alone: add the [[auditors]] that bract keys "
                "auditor printed"
            )
        return self


def read(path: Path) -> Federation:
    """Returns the federation in a TOML file, its paths made absolute.

    Raises:
        UsageError: for a key that does not exist or a value that will not do.
    """
    federation = parse(Federation, read_toml(path), source=str(path))
    folder = path.resolve().parent
    server = federation.server
    paths = {
        name: str(folder / value)
        for name in ("certificate", "key", "witness_key", "state", "out", "public_data")
        if (value := getattr(server, name)) is not None
    }
    data = federation.data
    if data.schema_file is not None:
        data = data.model_copy(update={"schema_file": str(folder / data.schema_file)})
    audit = federation.audit
    if audit is not None and audit.authority is not None:
        audit = audit.model_copy(update={"authority": str(folder / audit.authority)})
    return federation.model_copy(
        update={
            "audit": audit,
            "data": data,
            "coordinator_key": str(folder / federation.coordinator_key),
            "contract": str(folder / federation.contract),
            "server": server.model_copy(update=paths),
        }
    )


def propose(federation: Federation) -> SignedContract:
    """Returns the contract that a federation file describes, signed by its coordinator's key.

    Raises:
        UsageError: where no σ, q or δ would do, or the model cannot be built here.
    """
    from bract.shared import models  # brings torch, which nothing else here needs

    key = keys.load(Path(federation.coordinator_key))
    data = _data_terms(federation)
    agreed = Contract(
        run=federation.run,
        nonce=contracts.new_nonce(),
        coordinator=key.public,
        witness=keys.load(Path(federation.server.witness_key)).public,
        simulation=False,
        rounds=federation.rounds,
        max_attempts=federation.rounds + federation.spare_attempts,
        model=models.pinned(federation.model, data),
        data=data,
        training=federation.training,
        privacy=_privacy_terms(federation),
        evaluation=federation.evaluation,
        cohort=tuple(
            SiteTerms(
                name=site.name, key=site.key, domain=site.domain, nominal_size=site.nominal_size
            )
            for site in federation.sites
        ),
    )
    return contracts.sign(agreed, key)


def sampling_rate(federation: Federation) -> float:
    """Returns the rate q at which every site samples: the batch over the mean nominal size.

    Raises:
        UsageError: where it would be over 1.
    """
    sizes = [site.nominal_size for site in federation.sites]
    return rate_of(federation.privacy.batch, sizes)


def public_folder(federation: Federation) -> Path | None:
    """Returns the folder of the public examples, None where they need none or are found."""
    given = federation.server.public_data
    return folder_of(federation.data.name, folder=Path(given) if given else None, root=None)


def _data_terms(federation: Federation) -> DataTerms:
    folder = public_folder(federation)
    terms = federation.data.terms(folder)
    held = public.sha256(terms, folder)
    return terms.model_copy(update={"public": held})


def _privacy_terms(federation: Federation) -> PrivacyTerms:
    privacy = federation.privacy
    check_budget(privacy.epsilon, privacy.delta)
    check_delta(privacy.delta, max(site.nominal_size for site in federation.sites))
    rate = sampling_rate(federation)
    attempts = federation.rounds + federation.spare_attempts
    steps = attempts * federation.training.local_steps
    beside = entries.events_of_evaluations(
        federation.evaluation, attempts=attempts, completed=federation.rounds
    )
    sigma = privacy.noise_multiplier
    if sigma is None:
        ceiling = privacy.ceiling
        sigma = noise_within(
            epsilon_target=privacy.epsilon,
            ceiling=(ceiling, best_order(ceiling, privacy.delta)) if ceiling else None,
            delta=privacy.delta,
            sampling_rate=rate,
            steps=steps,
            beside=beside,
        )
    return PrivacyTerms(sampling_rate=rate, noise_multiplier=sigma, clip_norm=privacy.clip_norm)
