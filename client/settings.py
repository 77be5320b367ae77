"""SITE.toml: who a site is, what it holds, and its own hard limits."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from bract.client.training import devices
from bract.shared.configuration import Frozen, HostPort, first_fault, parse, read_toml
from bract.shared.data import dataset
from bract.shared.errors import UsageError
from bract.shared.policy import DomainPolicy, Policy
from bract.shared.terms import Hex32, Name


class Keys(Frozen):
    """The site's keys and the authority that vouches for the server."""

    root_certificate: str
    node: str
    ledger: str


class DataRoot(Frozen):
    """Where the examples of a domain lie: a data set's name, its folder, and the site's part."""

    name: str
    part: str
    folder: str | None = None

    @field_validator("name")
    @classmethod
    def _is_known(cls, name: str) -> str:
        try:
            dataset(name)
        except UsageError as error:
            raise ValueError(str(error)) from error
        return name


class Domain(DomainPolicy):
    """The budget of one body of data, and where that data lies."""

    data: DataRoot


class SiteSettings(Frozen):
    """A whole SITE.toml; relative paths are beside the file.

    `state` holds ledger, stored update and lock; `head_file`, on another disk, notices a ledger
    that was put back to an older copy. `stop_seconds` is how long a stop may wait for the round
    that is being trained. `evaluation` allows contracts that ask for noised scores on this site's
    own examples.
    """

    site: Name
    server: HostPort
    state: str = "state"
    head_file: str | None = None
    device: str = "auto"
    physical_batch: int | None = Field(default=None, ge=1)
    precision: Literal["float32", "bfloat16"] = "float32"
    stop_seconds: float = Field(default=60.0, ge=0)
    greatest_order_mib: int = Field(default=1024, ge=1)
    coordinators: tuple[Hex32, ...] = Field(min_length=1)
    models: tuple[str, ...] = Field(min_length=1)
    mechanisms: tuple[Literal["dp-sgd"], ...] = ("dp-sgd",)
    min_noise_multiplier: float = Field(default=0.3, gt=0)
    max_sampling_rate: float = Field(default=1.0, gt=0, le=1)
    evaluation: bool = False
    keys: Keys
    domains: dict[Name, Domain] = Field(min_length=1)

    @model_validator(mode="after")
    def _policy_holds(self) -> SiteSettings:
        try:
            self.policy()
        except ValidationError as error:
            raise ValueError(first_fault(error)) from error
        return self

    def policy(self) -> Policy:
        """Returns the limits that the gate enforces."""
        return Policy(
            site=self.site,
            coordinators=self.coordinators,
            domains={
                name: DomainPolicy(**domain.model_dump(exclude={"data"}))
                for name, domain in self.domains.items()
            },
            models=self.models,
            mechanisms=self.mechanisms,
            min_noise_multiplier=self.min_noise_multiplier,
            max_sampling_rate=self.max_sampling_rate,
            evaluation=self.evaluation,
        )


def read(path: Path) -> SiteSettings:
    """Returns the settings in a TOML file, its paths made absolute.

    Raises:
        UsageError: for a key that does not exist or a value that will not do.
    """
    settings = parse(SiteSettings, read_toml(path), source=str(path))
    folder = path.resolve().parent
    devices.resolve(settings.device)
    return settings.model_copy(
        update={
            "state": str(folder / settings.state),
            "head_file": str(folder / settings.head_file) if settings.head_file else None,
            "keys": Keys(
                **{name: str(folder / value) for name, value in settings.keys.model_dump().items()}
            ),
            "domains": {
                name: domain.model_copy(update={"data": _absolute(domain.data, folder)})
                for name, domain in settings.domains.items()
            },
        }
    )


def _absolute(data: DataRoot, folder: Path) -> DataRoot:
    return data.model_copy(update={"folder": str(folder / data.folder) if data.folder else None})
