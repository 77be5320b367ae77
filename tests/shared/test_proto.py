"""The code of audit.proto is what its generator makes of it."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from bract.shared.proto import __main__ as proto


def test_the_generated_code_is_what_the_proto_says(tmp_path: Path) -> None:
    if importlib.util.find_spec("grpc_tools") is None:
        if os.environ.get("CI") == "true":
            pytest.fail("grpcio-tools is not installed: pip install -e '.[dev]'")
        pytest.skip("needs grpcio-tools")
    proto.generate(tmp_path)
    for name in proto.GENERATED:
        made, kept = (tmp_path / name).read_text(), (proto.HERE / name).read_text()
        assert made == kept, f"{name}: run python -m bract.shared.proto"
