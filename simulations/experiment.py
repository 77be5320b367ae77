"""An experiment: everything a simulation needs, from TOML, options and `--set`."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from bract.shared.configuration import Frozen, parse, read_toml
from bract.shared.data.choice import DataChoice
from bract.shared.data.images import schema_of
from bract.shared.data.partitions import Partition
from bract.shared.errors import UnknownName, UsageError
from bract.shared.policy import Filter, Menu
from bract.shared.preparation import Preparation, Table
from bract.shared.terms import (
    GREATEST_NOISE,
    Delta,
    EvaluationTerms,
    Mechanism,
    ModelTerms,
    TrainingTerms,
    check_evaluation,
)

PACKAGE = "bract.simulations.experiments"


class DataSettings(DataChoice):
    """Which data set; `dir` is its folder or `file` its file, where it is not found by itself.

    `group_column` and `rows_per_group` are the schema's `group` and `rows_per_group`.
    """

    dir: str | None = None
    file: str | None = None
    group_column: str | None = None
    rows_per_group: int | None = None
    partition: Partition = Partition()

    def preparation(self) -> Preparation | None:
        """Returns what the schema says; without one the labels of images are their folders' names.

        These are the researcher's own to tell. No site's are read so.
        """
        if self.name == "images" and self.schema_file is None and self.dir is not None:
            return schema_of(Path(self.dir), self.options)
        found = super().preparation()
        given = {"group": self.group_column, "rows_per_group": self.rows_per_group}
        chosen = {key: value for key, value in given.items() if value is not None}
        if not chosen:
            return found
        if not isinstance(found, Table):
            raise UsageError(
                "--group-column and --rows-per-group need --schema FILE.toml of a table"
            )
        return parse(Table, {**found.model_dump(), **chosen}, source="--group-column")


class PrivacySettings(Frozen):
    """What a run may cost a site; σ is calibrated to ε unless it is given.

    With the mechanism "user-level" ε is that of a whole site; its `batch` is not protected apart.
    `batch` is the expected logical batch at a site of mean size: q = batch / mean nominal size.
    """

    mechanism: Mechanism = "dp-sgd"
    epsilon: float = Field(gt=0)
    delta: Delta
    clip_norm: float = Field(gt=0)
    batch: float = Field(gt=0)
    noise_multiplier: float | None = Field(default=None, gt=0, le=GREATEST_NOISE)


class PolicySettings(Frozen):
    """The ceiling of every simulated site's ledger."""

    epsilon: float = Field(gt=0)
    composition: Filter | Menu = Field(default=Filter(), discriminator="rule")
    min_noise_multiplier: float = Field(default=0.3, gt=0)
    max_sampling_rate: float = Field(default=1.0, gt=0, le=1)


class ExecutionSettings(Frozen):
    """How to compute; nothing here changes privacy."""

    mode: Literal["book-keeping", "opacus-hooks", "opacus-ghost"] = "book-keeping"
    physical_batch: int | None = Field(default=None, ge=1)
    precision: Literal["float32", "bfloat16"] = "float32"


class Experiment(Frozen):
    """A simulated federation.

    `sites_per_round` of all sites are asked in a round, chosen anew each time; None asks all.
    `spare_attempts` is what crashed and void rounds may cost: σ is calibrated to
    rounds + spare_attempts. `seed` makes partition, start, sampling and noise repeatable, which is
    why a simulation never carries a guarantee. `evaluation` asks the sites, whose policies then
    allow it, for noised scores on their own examples; σ is calibrated to what that costs too.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,60}$")
    seed: int = Field(ge=0, lt=2**63)
    sites: int = Field(ge=1, le=1_000_000)
    sites_per_round: int | None = Field(default=None, ge=1)
    rounds: int = Field(ge=1, le=1_000_000)
    spare_attempts: int = Field(default=2, ge=0, le=1_000_000)
    device: str = "cpu"
    data: DataSettings
    model: ModelTerms
    training: TrainingTerms
    privacy: PrivacySettings
    evaluation: EvaluationTerms | None = None
    policy: PolicySettings
    execution: ExecutionSettings = ExecutionSettings()

    @model_validator(mode="after")
    def _consistent(self) -> Experiment:
        check_evaluation(self.evaluation, self.rounds)
        if self.sites_per_round is not None and self.sites_per_round > self.sites:
            raise ValueError(
                f"sites_per_round {self.sites_per_round} is over the {self.sites} sites; lower it"
            )
        if self.evaluation is not None and self.privacy.mechanism == "user-level":
            raise ValueError("evaluation protects an example, not a client: leave it out")
        if self.privacy.mechanism != "none" and self.privacy.epsilon > self.policy.epsilon:
            raise ValueError(
                f"privacy.epsilon {self.privacy.epsilon} is over policy.epsilon "
                f"{self.policy.epsilon}; no site would take part"
            )
        return self


def names() -> list[str]:
    """Returns the experiments that ship with bract."""
    files = resources.files(PACKAGE).iterdir()
    return sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml"))


def load(
    name: str, *, model: str | None, overrides: Mapping[str, Any], settings: Iterable[str]
) -> Experiment:
    """Returns an experiment by name or file, with options and `key=value` settings applied.

    Other data than the experiment's come without its options and constants; the partition stays.
    Later wins: the file, its `variants.MODEL` table where `--model` names one, its `unprotected`
    table where `--set privacy.mechanism=none` asks for it, options, `--set`.

    Raises:
        UnknownName: for an unknown experiment or key.
        UsageError: for a value that will not do.
    """
    table = _read(name)
    variants, unprotected = table.pop("variants", {}), table.pop("unprotected", {})
    assignments = [_assignment(setting) for setting in settings]
    chosen = dict(assignments).get("model.name", model)
    if chosen is not None and chosen != table.get("model", {}).get("name"):
        table["model"] = {"name": chosen}
        _merge_(table, variants.get(chosen, {}))
    if dict(assignments).get("privacy.mechanism") == "none":
        _merge_(table, unprotected)
    _set_data_(table, dict(assignments).get("data.name", overrides.get("data.name")))
    for key, value in [*overrides.items(), *assignments]:
        if value is not None:
            _put_(table, key, value)
    return parse(Experiment, table, source=f"experiment {name!r}")


def _set_data_(table: dict[str, Any], name: str | None) -> None:
    """Leaves nothing of the experiment's own data where others are chosen."""
    data = table.get("data", {})
    if name not in (None, data.get("name")):
        kept = {key: value for key, value in data.items() if key == "partition"}
        table["data"] = {"name": name, **kept}


def _read(name: str) -> dict[str, Any]:
    if name.endswith(".toml"):
        return read_toml(Path(name))
    if name not in names():
        raise UnknownName("experiment", name, names())
    return tomllib.loads((resources.files(PACKAGE) / f"{name}.toml").read_text())


def _assignment(setting: str) -> tuple[str, Any]:
    key, equals, text = setting.partition("=")
    if not equals or not key:
        raise UsageError(f"--set {setting!r} must be key=value, as in --set training.momentum=0.9")
    try:
        return key, tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return key, text  # a bare word or path is a string


def _merge_(table: dict[str, Any], other: Mapping[str, Any]) -> None:
    for key, value in other.items():
        if isinstance(value, Mapping) and isinstance(table.get(key), dict):
            _merge_(table[key], value)
        else:
            table[key] = value


def _put_(table: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for part in path:
        inner = table.setdefault(part, {})
        if not isinstance(inner, dict):
            raise UsageError(f"--set {key}: {part} is a value, not a table")
        table = inner
    table[last] = value
