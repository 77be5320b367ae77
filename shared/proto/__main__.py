"""Generates the code of audit.proto anew: python -m bract.shared.proto [FOLDER].

It takes grpcio-tools, which running bract does not.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
GENERATED = ("audit_pb2.py", "audit_pb2.pyi", "audit_pb2_grpc.py")


def generate(folder: Path) -> None:
    """Writes the generated modules into a folder."""
    from grpc_tools import protoc

    with tempfile.TemporaryDirectory() as made:
        # Named as it is imported, so that the modules import each other so.
        arguments = [
            "protoc",
            f"-Ibract/shared/proto={HERE}",
            *(f"--{kind}={made}" for kind in ("python_out", "pyi_out", "grpc_python_out")),
            "bract/shared/proto/audit.proto",
        ]
        if protoc.main(arguments) != 0:
            raise SystemExit("protoc failed")
        for name in GENERATED:
            shutil.copyfile(Path(made) / "bract/shared/proto" / name, folder / name)


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
