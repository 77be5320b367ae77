"""What a run has trained: contract, weights and summary of its folder, held to each other."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bract.shared import arrays, canonical, contract, cost, models, tasks
from bract.shared.arrays import Arrays
from bract.shared.configuration import parse
from bract.shared.contract import Contract
from bract.shared.errors import UsageError, VerificationFailed
from bract.shared.privacy import accounting
from bract.shared.privacy.conformity import TOLERANCE
from bract.shared.reports.runs import ServerSummary, Summary
from bract.shared.terms import DataTerms

SUMMARY = "summary.json"


class RawModel(nn.Module):
    """A model from raw inputs, as they are read, to answers in the file's own unit.

    Inputs: (examples, *shape), numbers as they stand in the data or tokens. The contract's offset
    and scale are part of it, and so are the bounds of a value that is learned; scores of classes
    stay scores.
    """

    def __init__(self, model: nn.Module, data: DataTerms) -> None:
        super().__init__()
        self.model, self._data = model, data

    def forward(self, inputs: Tensor) -> Tensor:
        """Returns scores of (examples, classes), of each place for tokens, or (examples, 1)."""
        outputs = tasks.full(self.model(tasks.prepared(inputs, self._data)))
        return tasks.values_of(outputs, self._data) if self._data.task == "value" else outputs


@dataclass(frozen=True, slots=True, eq=False)
class Trained:
    """A trained model beside the contract that says what it is; `model` has the weights in it.

    `sha256` is that of the weights' file.
    """

    folder: Path
    contract: Contract
    weights: Arrays
    model: nn.Module
    sha256: str

    def raw_model(self) -> RawModel:
        """Returns the model with its weights, for inputs as they are read."""
        return RawModel(self.model, self.contract.data).eval()

    def summary(self) -> Summary | ServerSummary:
        """Returns what is known of the run.

        Raises:
            UsageError: where the run has not come to its end.
            VerificationFailed: where the summary is of another run or other weights, or tells less
                of ε than receipts beside it show.
        """
        path = self.folder / SUMMARY
        found = _json(path)
        read: Summary | ServerSummary = (
            parse(Summary, found, source=str(path))
            if "per_site" in found
            else parse(ServerSummary, found, source=str(path))
        )
        if read.contract_sha256 != self.contract.sha256:
            raise VerificationFailed(f"{path} is of another contract than contract.json beside it")
        if read.model_sha256 not in (None, self.sha256):
            raise VerificationFailed(
                f"{path} is of other weights than model.safetensors beside it: copy both again"
            )
        self._check_cost(read, path)
        return read

    def _check_cost(self, said: Summary | ServerSummary, path: Path) -> None:
        # A simulation's summary is of its ledgers, which bract audit verify reads.
        if said.epsilon_run is None or not self._is_receipted(said):
            return
        epsilon = accounting.epsilon(cost.shown(self.folder, self.contract), said.delta)
        if epsilon > said.epsilon_run + TOLERANCE:
            raise VerificationFailed(
                f"{path} says ε {said.epsilon_run:.4f} of this run, and the receipts beside it "
                f"show {epsilon:.4f}: copy it again"
            )

    def _is_receipted(self, said: Summary | ServerSummary) -> bool:
        return isinstance(said, ServerSummary) and cost.is_shown(self.folder, self.contract)

    def unproven(self, said: Summary | ServerSummary) -> list[str]:
        """Returns what a summary says by its own word alone, in sentences for whoever reads it."""
        found = []
        if said.model_sha256 is None:
            found.append(
                "The scores are by the run's own word: its summary does not name these weights."
            )
        claims = not self.contract.simulation and self.contract.privacy.mechanism != "none"
        if claims and not self._is_receipted(said):
            found.append("ε is by the run's own word: no receipts lie beside its summary.")
        return found


def read(folder: Path) -> Trained:
    """Returns the model in a run folder.

    Raises:
        UsageError: where there is none.
        VerificationFailed: where the contract is not its coordinator's, or the weights do not fit.
    """
    if not folder.is_dir():
        raise UsageError(f"no run folder {folder}: name the one that --out or server.out named")
    signed = contract.read(folder / "contract.json")
    agreed = signed.verify(signed.contract.coordinator)
    path = folder / "model.safetensors"
    try:
        content = path.read_bytes()
        weights = arrays.from_bytes(content)
    except OSError as error:
        raise UsageError(
            f"cannot read the model {path}: {error.strerror}; it is written when a run ends"
        ) from error
    except VerificationFailed as error:
        raise VerificationFailed(f"{path} is damaged: copy it again") from error
    model = models.of(agreed.model, agreed.data)
    fault = arrays.fault(weights, models.released_shapes(model))
    if fault is not None:
        raise VerificationFailed(f"{path} does not fit contract.json beside it: {fault}")
    return Trained(
        folder=folder,
        contract=agreed,
        weights=weights,
        model=_filled(model, weights),
        sha256=canonical.sha256(content),
    )


def _filled(model: nn.Module, weights: Arrays) -> nn.Module:
    with torch.no_grad():
        for name, parameter in models.released_parameters(model).items():
            parameter.copy_(torch.tensor(weights[name]))
    return model.eval()


def labels_of(data: DataTerms) -> tuple[str, ...]:
    """Returns the names of the classes, numbers from 0 where the contract names none."""
    prepared = data.preparation
    if prepared is None:
        return tuple(map(str, range(data.classes)))
    named = prepared.target.classes if prepared.kind == "table" else prepared.labels
    return named if named is not None else ()


def _json(path: Path) -> Mapping[str, Any]:
    try:
        found: Any = json.loads(path.read_bytes())
    except OSError as error:
        raise UsageError(
            f"cannot read {path}: {error.strerror}; it is written when a run ends"
        ) from error
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: copy it again") from error
    return found if isinstance(found, dict) else {}
