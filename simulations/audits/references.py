"""Models of an experiment, trained on chosen rows by the path that every simulation takes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bract.shared import trained
from bract.shared.data import Splits, load
from bract.shared.data.partitions import nominal_size
from bract.shared.errors import BractError
from bract.shared.evaluation import Evaluator
from bract.shared.privacy.calibration import rate_of
from bract.shared.reports.runs import Summary
from bract.shared.trained import Trained
from bract.simulations import simulation
from bract.simulations.audits.likelihood import confidence
from bract.simulations.audits.roc import Floats
from bract.simulations.engines import LocalEngine
from bract.simulations.experiment import Experiment
from bract.simulations.simulation import Simulation
from bract.simulations.workers import Pool

Rows = npt.NDArray[np.int64]
Scored = tuple[int, Floats | str]


@dataclass(frozen=True, slots=True, eq=False)
class Pooled:
    """What an experiment's sites would train on: each one's rows, and all of the data."""

    parts: list[Rows]
    splits: Splits

    @property
    def rows(self) -> Rows:
        """The rows of all sites, sorted."""
        return np.sort(np.concatenate(self.parts))

    @property
    def of_classes(self) -> bool:
        """Whether each example has one class for its target."""
        targets = self.splits.train.targets
        return targets.ndim == 1 and np.issubdtype(targets.dtype, np.integer)


def pooled(experiment: Experiment, data_dir: Path | None) -> Pooled:
    """Returns an experiment's data and their partition; trains nothing."""
    with tempfile.TemporaryDirectory(prefix="bract-") as folder:
        run = _begun(experiment, Path(folder), data_dir)
        where = run.begun.data_folder
        splits = load(run.begun.data, Path(where) if where else None)
        return Pooled(parts=run.parts(), splits=splits)


def audited(experiment: Experiment, data_dir: Path | None) -> tuple[Trained, Summary]:
    """Returns the model of a whole simulated run, and its summary after every ledger was verified.

    Raises:
        BractError: where sites refused rounds.
    """
    with tempfile.TemporaryDirectory(prefix="bract-") as folder:
        run = _begun(experiment, Path(folder), data_dir)
        summary = run.complete(LocalEngine())
        if summary.rounds < experiment.rounds:
            raise BractError(f"{experiment.name}: only {summary.rounds} rounds were completed")
        return trained.read(run.out), summary


def confidences(
    experiment: Experiment,
    pool: Pooled,
    member: npt.NDArray[np.bool_],
    *,
    data_dir: Path | None,
    workers: int,
    told: Callable[[], None],
) -> Floats:
    """Returns (models, rows of the pool): each model's confidence in each example.

    Args:
        experiment: of the models; each one's randomness has a seed of its own.
        pool: the rows there are, in the partition that all models share.
        member: (models, rows of the pool), what each model is trained on.
        data_dir: the folder of data sets.
        workers: processes, each of which trains a model at a time.
        told: is called when a model is done.

    Raises:
        BractError: where a model could not be trained.
    """
    train = _Train(experiment, pool, member, data_dir)
    models: Pool[int, Scored] = Pool(train, _lost, workers=min(workers, len(member)))
    found = np.empty(member.shape, dtype=np.float64)
    try:
        for model, scores in models.map(range(len(member))):
            if isinstance(scores, str):
                raise BractError(f"reference model {model + 1}: {scores}")
            found[model] = scores
            told()
    finally:
        models.close()
    return found


@dataclass(frozen=True, slots=True, eq=False)
class _Train:
    """Trains one model by its number, and scores the pool."""

    experiment: Experiment
    pool: Pooled
    member: npt.NDArray[np.bool_]
    data_dir: Path | None

    def __call__(self, model: int) -> Scored:
        try:
            return model, self._scored(model)
        except BractError as error:
            return model, str(error)
        except Exception as error:  # a worker's handler must not raise
            return model, f"unexpected {type(error).__name__}"

    def _scored(self, model: int) -> Floats:
        chosen = self.pool.rows[self.member[model]]
        parts = [part[np.isin(part, chosen)] for part in self.pool.parts]
        with tempfile.TemporaryDirectory(prefix="bract-") as folder:
            run = _begun(self._own(model, parts), Path(folder), self.data_dir)
            run.hold(parts)
            with run.prepared():
                run.run(LocalEngine())
            return self._confidence(trained.read(run.out))

    def _own(self, model: int, parts: list[Rows]) -> Experiment:
        """Returns a model's own experiment: the sampling rate, and so the noise, are everyone's.

        The partition is the pool's; another seed draws another start, other batches and noise.
        """
        privacy = self.experiment.privacy
        rate = rate_of(privacy.batch, [nominal_size(len(part)) for part in self.pool.parts])
        mean = float(np.mean([nominal_size(len(part)) for part in parts]))
        return self.experiment.model_copy(
            update={
                "seed": self.experiment.seed + 1 + model,
                "privacy": privacy.model_copy(update={"batch": min(rate * mean, mean)}),
            }
        )

    def _confidence(self, made: Trained) -> Floats:
        examples = self.pool.splits.train.take(self.pool.rows)
        outputs, _ = Evaluator(made.model, made.contract.data).each(made.weights, examples)
        return confidence(outputs, examples.targets)


def _lost(model: int) -> Scored:
    return model, "its process died: lower --workers, or free some memory"


def _begun(experiment: Experiment, folder: Path, data_dir: Path | None) -> Simulation:
    return simulation.begin(
        experiment, out=folder / "run", state=None, data_dir=data_dir, workers=1
    )
