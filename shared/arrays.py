"""Named arrays: their one byte form, their hash, and their rest as safetensors."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import safetensors.numpy

from bract.shared import canonical
from bract.shared.errors import VerificationFailed

Array = npt.NDArray[np.float32]
Arrays = Mapping[str, Array]


def digest(arrays: Arrays) -> str:
    """Returns a hash of names, shapes and float32 values, in the order of the names."""
    parts: list[bytes | memoryview] = []
    for name in sorted(arrays):
        value = np.asarray(arrays[name], dtype="<f4", order="C")
        content = value.reshape(-1).view(np.uint8).data  # no copy: a model may be large
        parts += [name.encode(), repr(value.shape).encode(), content]
    return canonical.tagged("arrays/1", *parts).hex()


def norm(arrays: Arrays) -> float:
    """Returns the L2 norm of all values together, in float64; it is finite where they are."""
    wide = (value.astype(np.float64) for value in arrays.values())
    # No dot: BLAS would start a thread on every core for it.
    return math.sqrt(sum(float(np.square(value, out=value).sum()) for value in wide))


def to_bytes(arrays: Arrays) -> bytes:
    """Returns the arrays as a safetensors file."""
    return bytes(
        safetensors.numpy.save({name: np.asarray(a, order="C") for name, a in arrays.items()})
    )


def save(arrays: Arrays, path: Path) -> None:
    """Writes a safetensors file that is whole or not there, with one copy of the arrays at most."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        safetensors.numpy.save_file(
            {name: np.asarray(a, order="C") for name, a in arrays.items()}, temporary
        )
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    canonical.sync_folder(path.parent)


def from_bytes(data: bytes) -> dict[str, Array]:
    """Returns the float32 arrays of a safetensors file.

    Raises:
        VerificationFailed: where the bytes are no such file.
    """
    try:
        return dict(safetensors.numpy.load(data))
    except Exception as error:  # safetensors raises its own type for a damaged header
        raise VerificationFailed("not a readable safetensors file") from error


def fault(arrays: Arrays, expected: Mapping[str, tuple[int, ...]]) -> str | None:
    """Returns what keeps arrays from being exactly the expected ones, or None.

    Exactly: these names, these shapes, float32, finite; nothing may be sent along.
    """
    if set(arrays) != set(expected):
        different = sorted(set(arrays) ^ set(expected))[0]
        return f"array {different!r} is {'extra' if different in arrays else 'missing'}"
    for name, shape in expected.items():
        if arrays[name].dtype != np.float32:
            return f"array {name!r} has dtype {arrays[name].dtype}, not float32"
        if arrays[name].shape != tuple(shape):
            return f"array {name!r} has shape {arrays[name].shape}, not {tuple(shape)}"
        if not np.isfinite(arrays[name]).all():
            return f"array {name!r} holds a value that is not finite"
    return None
