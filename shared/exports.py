"""A trained model as a file for others: checked against what it was made from before it is written.

"safetensors" holds the weights alone, "torch" and "onnx" a graph that takes inputs as they are
read: the contract's normalisation is in it. None of them holds a pickle.
"""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, cast

import numpy as np
import safetensors.numpy
import torch
from torch import Tensor

from bract.shared import arrays, tasks
from bract.shared.errors import BractError, UnknownName, UsageError
from bract.shared.terms import DataTerms
from bract.shared.trained import RawModel, Trained

TOLERANCE: Final = 1e-4
BATCHES: Final = (1, 5)  # the number of examples is free: another than it was made with, and one
Answers = Callable[[Tensor], np.ndarray]
_SEED: Final = 20  # of made-up inputs to compare on; nothing secret hangs on it


@dataclass(frozen=True, slots=True, eq=False)
class Exported:
    """The bytes of a file, and how far its answers are from the model's at the most."""

    content: bytes
    greatest_difference: float


def export(trained: Trained, form: str) -> Exported:
    """Returns a model in one of FORMATS.

    Raises:
        UnknownName: for a format that there is not.
        UsageError: where a library for it is not installed, naming the extra.
        BractError: where the model cannot be written in it, or what was written answers otherwise.
    """
    if form == "safetensors":
        return Exported(_weights(trained), 0.0)
    if form not in _GRAPHS:
        raise UnknownName("format", form, FORMATS)
    model, data = trained.raw_model(), trained.contract.data
    with _quiet():
        try:
            content, answers = _GRAPHS[form](model, data)
        except BractError:
            raise
        except Exception as error:  # a compiler's own: whatever a layer makes it raise
            raise BractError(
                f"model {trained.contract.model.name!r} cannot be written as {form} "
                f"({type(error).__name__}): choose --format safetensors"
            ) from error
    return Exported(content, _difference(model, data, answers, form))


def _weights(trained: Trained) -> bytes:
    """Returns the weights as safetensors, with what they are of in its header."""
    agreed = trained.contract
    facts = {
        "contract_sha256": agreed.sha256,
        "model": agreed.model.model_dump_json(),
        "data": json.dumps(agreed.data.model_dump(mode="json"), ensure_ascii=False),
    }
    values = {name: np.asarray(value, order="C") for name, value in trained.weights.items()}
    content = bytes(safetensors.numpy.save(values, metadata=facts))
    if arrays.digest(arrays.from_bytes(content)) != arrays.digest(trained.weights):
        raise BractError("the weights as written are not those of the run: nothing was kept")
    return content


def _torch(model: RawModel, data: DataTerms) -> tuple[bytes, Answers]:
    program = torch.export.export(model, (_raw(data, 2),), dynamic_shapes=(_free(),))
    # They would be written with pickle, and nobody needs them.
    program.example_inputs = None
    file = io.BytesIO()
    torch.export.save(program, file)
    again = torch.export.load(io.BytesIO(file.getvalue())).module()
    return file.getvalue(), lambda inputs: cast("Tensor", again(inputs)).numpy()


def _onnx(model: RawModel, data: DataTerms) -> tuple[bytes, Answers]:
    try:
        import onnx  # noqa: F401  torch names a missing one only deep inside
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UsageError(
            "--format onnx needs libraries that are not installed: pip install 'bract[export]'"
        ) from error
    program = torch.onnx.export(
        model,
        (_raw(data, 2),),
        dynamo=True,
        dynamic_shapes=(_free(),),
        input_names=["inputs"],
        output_names=["outputs"],
        verbose=False,
    )
    if program is None:
        raise BractError("torch gave no ONNX program: nothing was written")
    content: bytes = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return content, lambda inputs: np.asarray(session.run(None, {"inputs": inputs.numpy()})[0])


def _free() -> dict[int, Any]:
    return {0: torch.export.Dim("examples")}


def _raw(data: DataTerms, examples: int) -> Tensor:
    """Returns made-up inputs as they would be read: float32 numbers, or int64 tokens."""
    generator = torch.Generator().manual_seed(_SEED + examples)
    inputs, _ = tasks.made_up(data, examples, generator)
    return inputs if data.vocabulary is not None else inputs * data.scale + data.offset


@torch.inference_mode()
def _difference(model: RawModel, data: DataTerms, answers: Answers, form: str) -> float:
    """Returns the greatest difference of answers, relative to the greatest answer over 1.

    Raises:
        BractError: where it is over TOLERANCE.
    """
    greatest = 0.0
    for examples in BATCHES:
        inputs = _raw(data, examples)
        wanted, found = model(inputs).numpy(), answers(inputs)
        if wanted.shape != found.shape:
            raise BractError(f"the model as {form} gives {found.shape}, not {wanted.shape}")
        scale = max(1.0, float(np.abs(wanted).max()))
        greatest = max(greatest, float(np.abs(wanted - found).max()) / scale)
    if not greatest <= TOLERANCE:
        raise BractError(
            f"the model as {form} answers otherwise by {greatest:.2g}, over {TOLERANCE}: nothing "
            "was written; choose --format safetensors"
        )
    return greatest


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps what compilers say among themselves from stderr."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


_GRAPHS: dict[str, Callable[[RawModel, DataTerms], tuple[bytes, Answers]]] = {
    "torch": _torch,
    "onnx": _onnx,
}
FORMATS: Final = ("safetensors", *_GRAPHS)
