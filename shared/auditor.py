"""An auditor's side of the service: asks a server over gRPC, verifies, keeps what it was told."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from bract.shared import canonical, contract, disclosed, pki
from bract.shared.contract import Contract, SignedContract
from bract.shared.disclosed import Followed, Shown
from bract.shared.errors import BractError, UsageError, VerificationFailed
from bract.shared.privacy import anchors, receipts, witness
from bract.shared.privacy.witness import Extension, Link, Witness
from bract.shared.proto import audit_pb2 as pb
from bract.shared.proto import audit_pb2_grpc

CONNECT_SECONDS = 20.0
CALL_SECONDS = 600.0
GREATEST_MESSAGE = 4 * 1024 * 1024
# A site shows three entries a round of a kilobyte each: enough for a hundred thousand rounds.
GREATEST_TOTAL = 2**30
_CONTRACT, _ENTRIES, _RECEIPTS = "contract.json", "entries.jsonl", "receipts.jsonl"
_WITNESSES = "witnesses.json"


@dataclass(frozen=True, slots=True)
class Credentials:
    """The auditor's certificate and key, and who must have issued the server's: PEM files."""

    certificate: Path
    key: Path
    roots: Path


@dataclass(frozen=True, slots=True)
class Pulled:
    """What a server told, all of it verified; `extended` are the sites that were pulled before."""

    signed: SignedContract
    shown: dict[str, Shown]
    followed: dict[str, Followed]
    extended: tuple[str, ...]


def pull(
    address: str, credentials: Credentials, *, coordinator: str | None, folder: Path
) -> Pulled:
    """Asks a server for all that an auditor may see, verifies it, and keeps it in a folder.

    What an earlier pull left in the folder must be extended by it: the same contract, heads that
    grow, and every entry and receipt again. Where they are not, the folder stays as it was.

    Args:
        address: HOST:PORT, as FEDERATION.toml's audit.listen.
        credentials: the auditor's.
        coordinator: the public key that must have signed the contract; None takes its own word.
        folder: new, empty, or of an earlier pull.

    Raises:
        UsageError: where a file or the folder will not do.
        VerificationFailed: where what the server tells does not hold.
        BractError: where it does not answer, or not this auditor.
    """
    pki.check_auditor(credentials.certificate, credentials.key)
    before = _earlier(folder)
    with _asking(address, credentials) as stub:
        signed = _contract(stub, coordinator)
        _check_same(folder, signed)
        agreed = signed.contract
        heads = _heads(stub, agreed)
        shown = {site: _shown(stub, head) for site, head in heads.items()}
        followed = {site: disclosed.check(one, agreed) for site, one in shown.items()}
        for seen in before:
            _check_extended(stub, agreed, seen, heads.get(seen.site))
    pulled = Pulled(signed, shown, followed, tuple(seen.site for seen in before))
    files = _files(pulled)
    _check_held(folder, files)
    _keep(folder, files)
    return pulled


@contextmanager
def _asking(address: str, credentials: Credentials) -> Iterator[Any]:
    channel = grpc.secure_channel(
        address,
        grpc.ssl_channel_credentials(
            root_certificates=pki.read(credentials.roots),
            private_key=pki.read(credentials.key),
            certificate_chain=pki.read(credentials.certificate),
        ),
        options=[
            ("grpc.max_receive_message_length", GREATEST_MESSAGE),
            ("grpc.enable_retries", 0),
        ],
    )
    try:
        grpc.channel_ready_future(channel).result(timeout=CONNECT_SECONDS)
        yield _Stub(channel)
    except grpc.FutureTimeoutError as error:
        raise BractError(
            f"no answer from {address} within {CONNECT_SECONDS:g} s: is bract server running with "
            f"[audit], did the authority in {credentials.roots} issue its certificate for that "
            f"name, and has the coordinator's authority issued {credentials.certificate}?"
        ) from error
    except grpc.RpcError as error:
        # A refusal of a certificate comes after the connection, where TLS 1.3 has it.
        raise BractError(f"{address} refused: {error.details() or error.code().name}") from error
    finally:
        channel.close()


class _Stub:
    """The service's methods as generators of messages, bounded in time and size."""

    def __init__(self, channel: Any) -> None:
        made: Any = audit_pb2_grpc.AuditStub
        self._stub, self._left = made(channel), GREATEST_TOTAL

    def ask(self, method: str, request: Any) -> Iterator[Any]:
        """Yields what a method answers.

        Raises:
            VerificationFailed: where it is more than an honest server has.
        """
        call = getattr(self._stub, method)(request, timeout=CALL_SECONDS)
        for message in call:
            self._left -= message.ByteSize()
            if self._left < 0:
                call.cancel()
                raise VerificationFailed(f"the server sends over {GREATEST_TOTAL >> 20} MiB")
            yield message


def _contract(stub: _Stub, coordinator: str | None) -> SignedContract:
    found = [message.signed for message in stub.ask("Contracts", pb.ContractsRequest())]
    if len(found) != 1:
        raise VerificationFailed(f"the server shows {len(found)} contracts, a run has one")
    signed = contract.from_bytes(found[0], source="the server's contract")
    signed.verify(coordinator or signed.contract.coordinator)
    return signed


def _heads(stub: _Stub, agreed: Contract) -> dict[str, Witness]:
    heads: dict[str, Witness] = {}
    for message in stub.ask("Heads", pb.HeadsRequest()):
        seen = witness.from_bytes(message.witness)
        told = (message.site, message.domain, message.sequence, message.hash.hex())
        if told != (seen.site, seen.domain, seen.sequence, seen.hash) or seen.site in heads:
            raise VerificationFailed("a head is not the one that was countersigned")
        disclosed.check_witness(seen, agreed)
        heads[seen.site] = seen
    return heads


def _shown(stub: _Stub, head: Witness) -> Shown:
    since: Witness | None = None
    links: list[Link] = []
    for message in stub.ask("Entries", pb.EntriesRequest(site=head.site)):
        if message.WhichOneof("kind") == "since":
            if since is not None or links:
                raise VerificationFailed("entries begin twice")
            since = witness.from_bytes(message.since)
        else:
            link, number = message.link, (since.sequence + 1 if since else 0) + len(links)
            if link.sequence != number:
                raise VerificationFailed(f"entry {number} of {head.site!r} is not shown")
            if number <= head.sequence:  # a round may have been completed in the meantime
                links.append(Link(link.body_hash, link.body))
    updates = stub.ask("Updates", pb.UpdatesRequest(site=head.site))
    return Shown(
        head=head,
        ledger=Extension(since=since, links=tuple(links)),
        updates=tuple(receipts.from_bytes(message.received) for message in updates),
    )


def _check_extended(stub: _Stub, agreed: Contract, before: Witness, now: Witness | None) -> None:
    disclosed.check_witness(before, agreed)
    if now is None or now.sequence < before.sequence:
        raise VerificationFailed(
            f"the head of {before.site!r} that was pulled before, entry {before.sequence}, is gone"
        )
    request = pb.ConsistencyRequest(
        site=before.site, domain=before.domain, first=before.sequence, second=now.sequence
    )
    links = [(one.sequence, one.body_hash) for one in stub.ask("Consistency", request)]
    disclosed.check_consistent(before, now, links)


def _earlier(folder: Path) -> tuple[Witness, ...]:
    """Returns the heads that an earlier pull left in a folder."""
    path = folder / _WITNESSES
    if path.exists():
        return anchors.witnesses(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is not empty and holds no earlier pull: name a new folder")
    return ()


def _check_same(folder: Path, signed: SignedContract) -> None:
    if _held(folder, _CONTRACT) not in (None, signed.to_bytes()):
        raise VerificationFailed(
            f"the server shows another contract than {folder / _CONTRACT}, which was pulled "
            "before: name a new folder for it"
        )


def _check_held(folder: Path, files: Mapping[str, bytes]) -> None:
    """Returns where no entry and no receipt of an earlier pull is missing from this one."""
    for name in (_ENTRIES, _RECEIPTS):
        lines = (_held(folder, name) or b"").splitlines()
        gone = len(set(lines) - set(files[name].splitlines()))
        if gone:
            raise VerificationFailed(
                f"the server no longer shows {gone} of the {len(lines)} lines of {folder / name}: "
                "keep that folder as evidence, and name a new one for what it shows now"
            )


def _held(folder: Path, name: str) -> bytes | None:
    """Returns a file of an earlier pull, None where there was no such pull."""
    path = folder / name
    if not (folder / _WITNESSES).exists():
        return None
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"cannot read {path} of the earlier pull: {error.strerror}; put it back, or name a new "
            "folder"
        ) from error


def _files(pulled: Pulled) -> dict[str, bytes]:
    shown = [one for _, one in sorted(pulled.shown.items())]
    updates = (update for one in shown for update in one.updates)
    return {
        _CONTRACT: pulled.signed.to_bytes(),
        _ENTRIES: b"".join(line for one in shown for line in _lines(one)),
        _RECEIPTS: receipts.to_lines(updates),
        _WITNESSES: anchors.to_bytes(one.head for one in shown),  # the last: see _earlier
    }


def _keep(folder: Path, files: Mapping[str, bytes]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            canonical.write_atomically(folder / name, text)
    except OSError as error:
        raise UsageError(f"cannot write to {folder}: {error.strerror}") from error


def _lines(shown: Shown) -> Iterable[bytes]:
    for head, link in zip(witness.follow(shown.ledger), shown.ledger.links, strict=True):
        facts = {
            "site": shown.head.site,
            "domain": shown.head.domain,
            "sequence": head[0].sequence,
            "hash": head[0].hash,
            "body_hash": link.body_hash.hex(),
            "body": canonical.decode(link.body) if link.body else None,
        }
        yield canonical.encode(facts) + b"\n"
