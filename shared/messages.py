"""What server and site say to each other; `bract.shared.wire` says how it travels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from bract.shared import arrays, keys
from bract.shared.arrays import Arrays
from bract.shared.contract import SignedContract
from bract.shared.errors import Reason, VerificationFailed
from bract.shared.packing import Sum
from bract.shared.privacy.receipts import Receipt
from bract.shared.privacy.witness import NOTHING, Extension, Witness
from bract.shared.updates import Update


@dataclass(frozen=True, slots=True, eq=False)
class TrainOrder:
    """Train one round of a contract from these weights."""

    contract: SignedContract
    round: int
    weights: Arrays
    witness: Witness | None = None


@dataclass(frozen=True, slots=True)
class CloseOrder:
    """The last exchange of a run: it delivers the last witness."""

    contract: SignedContract
    witness: Witness


@dataclass(frozen=True, slots=True, eq=False)
class SignedReceipt:
    """A receipt, the site's signature of it, and what its ledger grew by."""

    receipt: Receipt
    signature: bytes
    ledger: Extension = NOTHING

    def verify(self, key: str) -> None:
        """Returns where the site's key signed the receipt.

        Raises:
            VerificationFailed: otherwise.
        """
        keys.verify(key, self.signature, self.receipt.digest())


@dataclass(frozen=True, slots=True, eq=False)
class TrainReply(SignedReceipt):
    """An update with its signed receipt."""

    update: Update = field(kw_only=True)

    def verify(self, key: str) -> None:
        """Returns where the site's key signed the receipt and the receipt names the update.

        Raises:
            VerificationFailed: otherwise.
        """
        SignedReceipt.verify(self, key)
        if arrays.digest(self.update.arrays) != self.receipt.update:
            raise VerificationFailed("the receipt is of another update")


@dataclass(frozen=True, slots=True, eq=False)
class SummedReply:
    """The replies of sites whose updates were checked and added up where they were made.

    Args:
        place: of the sum among those of a round.
        receipts: of every update in the sum, by the node of its site.
        total: float64, each update times its site's weight.
    """

    place: int
    receipts: Mapping[int, SignedReceipt]
    total: Mapping[str, Sum]


@dataclass(frozen=True, slots=True)
class RefusalReply:
    """A reason of the closed list; nothing of the site's data."""

    site: str
    round: int
    reason: Reason
