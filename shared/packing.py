"""Arrays as they travel: raw bytes with a type and a shape, in which no object can hide."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import Array as FlowerArray
from flwr.app import ArrayRecord

from bract.shared.arrays import Array, Arrays
from bract.shared.errors import VerificationFailed

_STYPE = "numpy.ndarray.raw"
_FLOAT32 = np.dtype(np.float32)
Sum = npt.NDArray[np.float64]


def pack(arrays: Arrays | Mapping[str, Sum]) -> ArrayRecord:
    """Returns arrays as they travel; messages to many sites share one such record."""
    return ArrayRecord(
        {
            name: FlowerArray(
                dtype=str(value.dtype), shape=value.shape, stype=_STYPE, data=value.tobytes()
            )
            for name, value in arrays.items()
        }
    )


def bytes_of(record: ArrayRecord) -> int:
    """Returns the bytes of a record's arrays as they travel, without names and headers."""
    return sum(len(array.data) for array in record.values())


def unpack(record: Any) -> dict[str, Array]:
    """Returns read-only views of the float32 arrays in a record.

    Raises:
        VerificationFailed: where it is anything else.
    """
    return {name: _view(name, value) for name, value in _arrays(record)}


def unpack_sum(record: Any) -> dict[str, Sum]:
    """Returns copies of the float64 arrays in a record.

    Raises:
        VerificationFailed: where it is anything else.
    """
    return {
        name: _view(name, value, np.dtype(np.float64)).copy() for name, value in _arrays(record)
    }


def _arrays(record: Any) -> Iterable[tuple[str, FlowerArray]]:
    if not isinstance(record, ArrayRecord):
        raise VerificationFailed("a message without arrays")
    return record.items()


def _view(name: str, value: FlowerArray, kind: np.dtype[Any] = _FLOAT32) -> npt.NDArray[Any]:
    # Never np.load: raw float32 bytes cannot hold an object, so nothing is unpickled.
    shape = tuple(value.shape)
    # math.prod has no width that a hostile shape could overflow.
    expected = kind.itemsize * math.prod(shape) if all(n >= 0 for n in shape) else -1
    if value.stype != _STYPE or value.dtype != kind.name or len(value.data) != expected:
        raise VerificationFailed(f"array {name!r} is not raw {kind.name} of its shape")
    try:
        # A read-only view of immutable bytes: nothing that is done with it can reach the message.
        return np.frombuffer(value.data, dtype=kind).reshape(shape)
    except (ValueError, OverflowError) as error:  # no elements, yet an axis beyond numpy's
        raise VerificationFailed(f"array {name!r} has a shape that cannot be held") from error
