from __future__ import annotations

import pytest
import torch

from bract.client.training import devices
from bract.shared.errors import UsageError


def test_auto_is_a_gpu_where_there_is_one_and_else_the_cpu() -> None:
    expected = "cuda:0" if torch.cuda.is_available() else "cpu"
    assert devices.resolve("auto") == torch.device(expected)


def test_cpu_is_there() -> None:
    assert devices.resolve("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["cuda:9", "meta", "mps", "tpu", "cuda:x", ""])
def test_device_that_is_not_there_is_named_with_a_remedy(name: str) -> None:
    with pytest.raises(UsageError, match=f"device '{name}': use auto"):
        devices.resolve(name)
