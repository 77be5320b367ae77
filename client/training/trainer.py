"""One round at one site: Poisson batches, clipped sums, one noise draw a step, an update."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch

from bract.client.training import admission, gradients, scoring
from bract.client.training.clipping import SLACK
from bract.client.training.embeddings import padding_rows
from bract.client.training.execution import Execution
from bract.client.training.isolation import GREATEST_WEIGHT
from bract.client.training.optimizer import PlainOptimizer, PrivateOptimizer, Sgd
from bract.client.training.randomness import RandomStream, check_turning
from bract.client.training.sums import BatchSums
from bract.client.training.together import Job, SharedStep
from bract.client.training.trials import load
from bract.shared import arrays, models
from bract.shared.arrays import Array, Arrays
from bract.shared.contract import Contract
from bract.shared.data import Examples
from bract.shared.errors import Reason, Refusal
from bract.shared.models.frozen import Features, FrozenFront
from bract.shared.terms import SiteTerms
from bract.shared.updates import KINDS, ProtectedScore, Update


class Trainer:
    """A model kept warm on its device, and the private rounds it runs.

    Of a model with a frozen front only what lies behind it is run in a step: the front's features
    of the same examples are computed once.

    Args:
        contract: the verified contract; model, data terms and mechanism come from it.
        execution: how to compute.

    Raises:
        ModelRejected: where the model cannot be trained with per-example privacy.
        UsageError: where a GPU would make other noise of the host's words than the host.
        VerificationFailed: where its frozen weights are not those of the contract.
    """

    def __init__(self, contract: Contract, execution: Execution) -> None:
        # TF32 keeps 10 bits of a product: a norm in it could pass the bound.
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        model = models.of(contract.model, contract.data)
        admission.admit_once(model, terms=contract.model, data=contract.data)
        device = torch.device(execution.device)
        model, features = model.to(device).train(), None
        if isinstance(model, FrozenFront) and contract.training.views == 1:
            features = Features(model, contract.data, device)
            model = model.behind()
        self._model, self._contract = model, contract
        self._noise_ahead = execution.noise_ahead
        self.parameters = models.released_parameters(model)
        self.shapes = models.released_shapes(model)
        self._padding = padding_rows(model)
        self._sums = BatchSums(contract, execution, model, features)
        self._shared = SharedStep(contract, self._sums.parameters, self.parameters)
        if device.type == "cuda":  # before any charge, by the name that noise knows it by
            check_turning(next(iter(self.parameters.values())).device)
        self._sums.rehearse()

    def check(self, weights: Arrays) -> None:
        """Returns where weights are exactly those that are trained, finite and not too large.

        Raises:
            Refusal: otherwise.
        """
        fault = arrays.fault(weights, self.shapes)
        if fault or any(np.abs(v).max(initial=0) > GREATEST_WEIGHT for v in weights.values()):
            raise Refusal(Reason.WEIGHTS_INVALID, fault or f"a weight is over {GREATEST_WEIGHT:g}")

    def train(
        self, *, terms: SiteTerms, examples: Examples, weights: Arrays, stream: RandomStream
    ) -> Update:
        """Returns the update of one round: the contract's local steps from `weights`.

        Runs exactly `local_steps` steps, empty batches included: a skipped one would tell.

        Args:
            terms: this site's public terms.
            examples: opened by the gate, after the charge.
            weights: exactly the released parameters.
            stream: the randomness of this attempt.
        """
        self._load(weights)
        optimizer = self._optimizer(terms, stream)
        rate, expected = self._contract.privacy.sampling_rate, self._contract.normaliser(terms)
        ready = self._sums.ready(examples)
        with gradients.expected_warnings():
            for _ in range(self._contract.training.local_steps):
                batch = stream.poisson_sample(len(examples), rate)
                moves = self._sums.moves(len(batch), stream)
                if self._noise_ahead and isinstance(optimizer, PrivateOptimizer):
                    optimizer.draw_ahead(_drawing(os.getpid()))
                optimizer.put(self._sums.of(ready, batch, moves, expected))
                optimizer.step()
                self._hold_padding(weights)
                optimizer.zero_grad()
        return self._update(weights)

    def train_together(self, jobs: Sequence[Job], weights: Arrays) -> list[Update]:
        """Returns the update of each of several sites that one process serves, as `train` does.

        Sites whose one step starts from the same weights share its pass: their examples are run
        together, and each site's clipped gradients are summed and noised apart. The numbers are
        those of `train` but for how a product of more rows is rounded.
        """
        together = self._sums.may_be_shared and not self._padding
        if not (together and self._shared.holds(len(jobs))):
            return [
                self.train(
                    terms=job.terms, examples=job.examples, weights=weights, stream=job.stream
                )
                for job in jobs
            ]
        self._load(weights)
        rate = self._contract.privacy.sampling_rate
        batches = [job.stream.poisson_sample(len(job.examples), rate) for job in jobs]
        with gradients.expected_warnings():
            rows = self._sums.apart(self._shared, jobs, batches)
        kind = KINDS[self._contract.privacy.mechanism]
        return [kind(values) for values in self._shared.updates(rows, jobs, weights)]

    def score(self, *, examples: Examples, weights: Arrays, stream: RandomStream) -> ProtectedScore:
        """Returns how `weights` do on a site's own examples, with the contract's noise.

        Args:
            examples: opened by the gate, after the charge of the evaluation.
            weights: as the order brought them.
            stream: the randomness of this attempt.
        """
        asked = self._contract.evaluation
        if asked is None:
            raise ValueError("the contract asks for no evaluation")
        self._load(weights)
        correct, total = scoring.counts(self._model, examples, self._sums.batch)
        return scoring.protect(
            correct, total, noise_multiplier=asked.noise_multiplier, stream=stream
        )

    def _optimizer(
        self, terms: SiteTerms, stream: RandomStream
    ) -> PlainOptimizer | PrivateOptimizer:
        training, privacy = self._contract.training, self._contract.privacy
        normaliser = self._contract.normaliser(terms)
        parameters, rate = self.parameters.values(), training.learning_rate
        if privacy.mechanism != "dp-sgd":
            return PlainOptimizer(
                parameters, lr=rate, momentum=training.momentum, normaliser=normaliser
            )
        return PrivateOptimizer(
            Sgd(parameters, lr=rate, momentum=training.momentum),
            noise_multiplier=privacy.noise_multiplier,
            clip_norm=privacy.clip_norm,
            normaliser=normaliser,
            stream=stream,
        )

    def _load(self, weights: Arrays) -> None:
        found = (np.array(weights[name], dtype=np.float32) for name in self.parameters)
        load(self.parameters.values(), [torch.from_numpy(value) for value in found])

    def _hold_padding(self, weights: Arrays) -> None:
        """Puts the rows back that only noise moved: an embedding's padding stays as it began."""
        for name, row in self._padding:
            before = torch.from_numpy(np.array(weights[name][row], dtype=np.float32))
            self.parameters[name].data[row] = before

    def _update(self, weights: Arrays) -> Update:
        values: dict[str, Array] = {
            # in C's order, though a mode may keep a weight with its channels last
            name: np.asarray(parameter.detach().cpu().numpy() - weights[name], order="C")
            for name, parameter in self.parameters.items()
        }
        if self._contract.privacy.mechanism == "user-level":
            values = clipped(values, self._contract.privacy.clip_norm)
        return KINDS[self._contract.privacy.mechanism](values)


def clipped(update: Arrays, clip_norm: float) -> dict[str, Array]:
    """Returns an update whose joint norm is C(1 − 1e-3) at the most; zeros where it is not finite.

    The slack is for float32, in which the scaled numbers are rounded.
    """
    norm = arrays.norm(update)
    if not math.isfinite(norm):
        return {name: np.zeros_like(value) for name, value in update.items()}
    factor = min(1.0, clip_norm * (1 - SLACK) / norm) if norm > 0 else 1.0
    return {name: np.asarray(value * factor, np.float32) for name, value in update.items()}


@lru_cache(maxsize=1)
def _drawing(process: int) -> ThreadPoolExecutor:
    """Returns the one thread of this process that draws noise; a forked one has its own."""
    return ThreadPoolExecutor(1, thread_name_prefix="noise")
