"""Which data set, as an experiment or a FEDERATION.toml chooses it."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from bract.shared.configuration import Frozen, parse, read_toml
from bract.shared.data import describe
from bract.shared.errors import UsageError
from bract.shared.preparation import Images, Preparation, Table, Text
from bract.shared.terms import DataTerms, Scalar


class DataChoice(Frozen):
    """A data set by name, its options, and the public constants that prepare its inputs.

    `schema_file` is a TOML file with the preparation of a table, a text or a folder of images of
    the user's own. `offset` and `scale` take the place of the data set's.
    """

    name: str
    options: dict[str, Scalar] = Field(default={})
    schema_file: str | None = None
    offset: float | None = None
    scale: float | None = Field(default=None, gt=0)

    def terms(self, where: Path | None = None) -> DataTerms:
        """Returns the terms that a contract holds.

        Args:
            where: the folder or file whose public part is opened, if anything is learned from it.

        Raises:
            UsageError: where the schema or an option will not do.
        """
        preparation, options = self.preparation(), self.options
        if preparation is not None and self.schema_file is None:
            options = {}  # which the preparation was made of
        terms = describe(self.name, options, preparation, where)
        return terms.scaled(self.offset, self.scale)

    def preparation(self) -> Preparation | None:
        """Returns what the schema says, None where there is none."""
        return None if self.schema_file is None else read_schema(Path(self.schema_file))


def read_schema(path: Path) -> Preparation:
    """Returns the preparation in a TOML file.

    Raises:
        UnknownName: for a key that does not exist, naming the nearest that does.
        UsageError: naming the first key that will not do.
    """
    kinds: dict[str, type[Table | Text | Images]] = {"table": Table, "text": Text, "images": Images}
    table = read_toml(path)
    kind = table.get("kind")
    if kind not in kinds:
        raise UsageError(f"{path}: kind {kind!r} must be one of {', '.join(kinds)}")
    return parse(kinds[kind], table, source=str(path))
