"""How simulated sites share a data set, by flwr-datasets' partitioners."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from bract.shared.configuration import Frozen
from bract.shared.data.examples import Groups
from bract.shared.data.persons import rows_of
from bract.shared.errors import UnknownName, UsageError


class Partition(Frozen):
    """A partition of the training examples over sites.

    `iid` shuffles and cuts; `dirichlet` draws each label's shares from Dirichlet(`alpha`);
    `label` gives site i the labels i to i + `labels_per_site` − 1, round and round; `sizes` grows
    the sizes linearly; `natural` leaves the data set's own groups, such as hospitals, as they are:
    all of them, those that `only` names, or with `drop_small` those that have `min_size` examples.
    """

    kind: Literal["iid", "dirichlet", "label", "sizes", "natural"] = "iid"
    alpha: float = Field(default=0.5, gt=0)
    labels_per_site: int = Field(default=2, ge=1)
    min_size: int = Field(default=10, ge=1)
    only: tuple[str, ...] = ()
    drop_small: bool = False

    @model_validator(mode="after")
    def _only_groups(self) -> Partition:
        if self.only and self.kind != "natural":
            raise ValueError(f"only names groups, which the kind {self.kind!r} has not")
        if self.drop_small and self.kind != "natural":
            raise ValueError(f"drop_small leaves out groups, which the kind {self.kind!r} has not")
        if len(set(self.only)) < len(self.only):
            raise ValueError("only names a group twice; name each once")
        return self


def split(
    targets: np.ndarray,
    *,
    sites: int,
    partition: Partition,
    seed: int,
    groups: Groups | None = None,
    persons: npt.NDArray[np.int64] | None = None,
) -> list[npt.NDArray[np.int64]]:
    """Returns the rows of each site, disjoint and sorted.

    Args:
        targets: of the training examples.
        sites: how many.
        partition: how they share the examples.
        seed: repeats the partition; `natural` has nothing to draw.
        groups: where the data set has them.
        persons: whose each example is, where that is known: a person is at one site, which is
            chosen by the label of that person's first example.

    Raises:
        UsageError: where the examples do not suffice for the sites.
    """
    if persons is not None:
        _, first = np.unique(persons, return_index=True)
        each = split(targets[first], sites=sites, partition=partition, seed=seed)
        return [rows_of(persons, chosen) for chosen in each]
    if partition.kind in ("dirichlet", "label") and np.issubdtype(targets.dtype, np.floating):
        raise UsageError(
            f"partition {partition.kind!r} is by label, and these targets are numbers: set "
            "data.partition.kind to iid or sizes"
        )
    if partition.kind == "natural":
        names = group_names(groups, sites=sites, partition=partition)
        rows = groups.rows() if groups else {}
        return _of_min_size([rows[name] for name in names], partition)
    if not 1 <= sites <= len(targets) // partition.min_size:
        raise UsageError(
            f"{sites} sites cannot share {len(targets)} examples with at least "
            f"{partition.min_size} each: use 1 to {len(targets) // partition.min_size} sites"
        )
    if targets.ndim > 1:
        if partition.kind in ("dirichlet", "label"):
            raise UsageError(
                f"partition {partition.kind!r} goes by labels, and these data have none: choose "
                "iid, sizes or natural"
            )
        targets = np.zeros(len(targets), dtype=np.int64)
    _check_labels(targets, sites=sites, partition=partition)
    order = np.random.default_rng(seed).permutation(len(targets))
    if partition.kind == "iid":  # as IidPartitioner cuts, which is slow for thousands of sites
        return _of_min_size([np.sort(part) for part in np.array_split(order, sites)], partition)
    partitioner = _partitioner(sites, partition, seed)
    try:
        partitioner.dataset = _dataset(targets[order])
        parts = [
            np.sort(order[np.asarray(partitioner.load_partition(site)["row"], dtype=np.int64)])
            for site in range(sites)
        ]
    except ValueError as error:
        raise UsageError(f"partition {partition.kind!r} over {sites} sites: {error}") from error
    return _of_min_size(parts, partition)


def group_names(groups: Groups | None, *, sites: int, partition: Partition) -> tuple[str, ...]:
    """Returns the names of the sites that a natural partition makes, in their order.

    Raises:
        UsageError: where the data set has no groups, or another number of sites is asked for.
        UnknownName: for a group that is not there.
    """
    if groups is None:
        raise UsageError(
            "this data set has no groups of its own: set data.partition.kind to iid, dirichlet, "
            "label or sizes"
        )
    for name in partition.only:
        if name not in groups.names:
            raise UnknownName("group in data.partition.only", name, groups.names)
    chosen = tuple(n for n in groups.names if not partition.only or n in partition.only)
    if partition.drop_small:
        rows = groups.rows()
        chosen = tuple(n for n in chosen if len(rows[n]) >= partition.min_size)
    if sites != len(chosen):
        raise UsageError(
            f"partition 'natural' makes {len(chosen)} sites of these data, not {sites}: set sites "
            f"to {len(chosen)}, or choose groups with data.partition.only"
        )
    return chosen


def _of_min_size(
    parts: list[npt.NDArray[np.int64]], partition: Partition
) -> list[npt.NDArray[np.int64]]:
    if min(len(part) for part in parts) < partition.min_size:
        raise UsageError(
            f"partition {partition.kind!r} leaves a site under {partition.min_size} examples: "
            "use fewer sites, or lower data.partition.min_size"
        )
    return parts


def _check_labels(targets: npt.NDArray[np.int64], *, sites: int, partition: Partition) -> None:
    """Refuses a partition by label that would leave labels at no site."""
    labels, each = len(np.unique(targets)), partition.labels_per_site
    if partition.kind == "label" and not each <= labels <= sites + each - 1:
        raise UsageError(
            f"{sites} sites of {each} labels, each one label on from the last, do not hold all "
            f"{labels} labels: set data.partition.labels_per_site to "
            f"{max(labels - sites + 1, 1)} or more, {labels} at the most"
        )


def nominal_size(true_size: int) -> int:
    """Returns the public size an operator would declare: two digits, rounded down.

    Example:
        >>> nominal_size(5_987), nominal_size(260)
        (5900, 260)
    """
    unit = int("1" + "0" * max(len(str(true_size)) - 2, 0))
    return true_size // unit * unit


def _partitioner(sites: int, partition: Partition, seed: int) -> Any:
    from flwr_datasets import partitioner as flower  # slow to import

    match partition.kind:
        case "dirichlet":
            return flower.DirichletPartitioner(
                num_partitions=sites,
                partition_by="label",
                alpha=partition.alpha,
                min_partition_size=partition.min_size,
                seed=seed,
            )
        case "label":
            return flower.PathologicalPartitioner(
                num_partitions=sites,
                partition_by="label",
                num_classes_per_partition=partition.labels_per_site,
                class_assignment_mode="deterministic",
                seed=seed,
            )
        case "sizes":
            return flower.LinearPartitioner(num_partitions=sites)


def _dataset(targets: npt.NDArray[np.int64]) -> Any:
    from datasets import Dataset

    return Dataset.from_dict({"label": targets.tolist(), "row": list(range(len(targets)))})
