"""The auditor's service on its own address: gRPC with mutual TLS, for listed auditors alone.

Health and reflection stand behind the same door.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc
from cryptography import x509
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from bract.server import checkpoint, received
from bract.server.disclosure import Disclosure, Unknown
from bract.shared import keys, pki
from bract.shared.contract import Contract
from bract.shared.errors import BractError, UsageError
from bract.shared.federation import Federation
from bract.shared.privacy.witness import Witness
from bract.shared.proto import audit_pb2 as pb
from bract.shared.proto import audit_pb2_grpc

_add_answers: Callable[[Any, Any], None] = audit_pb2_grpc.add_AuditServicer_to_server
logger = logging.getLogger("bract.server")

SERVICE: Final = pb.DESCRIPTOR.services_by_name["Audit"].full_name
# An auditor asks little and seldom; more than this is a mistake or an attack.
GREATEST_REQUEST = 16 * 1024
GREATEST_ANSWER = 4 * 1024 * 1024
CONCURRENT = 8
CONNECTION_SECONDS = 600
STOP_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Door:
    """Where to listen, by which certificate, and whom to answer.

    Args:
        address: HOST:PORT.
        certificate: the server's chain, PEM.
        key: its private key, PEM.
        authority: signs auditors' certificates, PEM.
        auditors: their names by the SHA-256 of their certificates.
    """

    address: str
    certificate: bytes
    key: bytes
    authority: bytes
    auditors: Mapping[str, str]


class AuditServer:
    """The service in threads of this process."""

    def __init__(self, door: Door, disclosure: Disclosure) -> None:
        self._door = door
        self._server = grpc.server(
            futures.ThreadPoolExecutor(CONCURRENT, thread_name_prefix="audit"),
            interceptors=[_Listed(door.auditors)],
            maximum_concurrent_rpcs=CONCURRENT,
            options=[
                ("grpc.max_receive_message_length", GREATEST_REQUEST),
                ("grpc.max_send_message_length", GREATEST_ANSWER),
                ("grpc.max_metadata_size", GREATEST_REQUEST),
                ("grpc.max_concurrent_streams", CONCURRENT),
                ("grpc.max_connection_age_ms", CONNECTION_SECONDS * 1000),
                ("grpc.max_connection_age_grace_ms", CONNECTION_SECONDS * 1000),
                ("grpc.so_reuseport", 0),  # else two servers could share the port unnoticed
            ],
        )
        # Its other way gets answers past the interceptor, by a callback.
        self._health = health.HealthServicer(experimental_non_blocking=False)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        _add_answers(_Answers(disclosure), self._server)
        reflection.enable_server_reflection(
            (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server
        )

    def start(self) -> int:
        """Returns the port once it answers.

        Raises:
            BractError: where it cannot be had, or the certificate cannot be used.
        """
        door = self._door
        try:
            credentials = grpc.ssl_server_credentials(
                [(door.key, door.certificate)],
                root_certificates=door.authority,
                require_client_auth=True,
            )
            port = int(self._server.add_secure_port(door.address, credentials))
        except (RuntimeError, ValueError) as error:
            raise BractError(
                f"cannot serve auditors on {door.address}: the port is taken, or the certificate "
                "and key do not fit; correct audit.listen"
            ) from error
        self._server.start()
        for name in ("", SERVICE):
            self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        logger.info("answering auditors", extra={"event": "auditing", "port": port})
        return port

    def stop(self) -> None:
        """Ends what is being answered and gives the port back."""
        self._health.enter_graceful_shutdown()
        self._server.stop(STOP_SECONDS).wait()


def door_of(chosen: Federation) -> Door | None:
    """Returns where auditors are answered, None where the federation has no [audit].

    Raises:
        UsageError: where nothing says who signs their certificates.
    """
    if chosen.audit is None:
        return None
    certificate, authority = Path(chosen.server.certificate), chosen.audit.authority
    if authority is not None:
        trusted = pki.certificates(Path(authority))
    else:
        trusted = pki.certificates(certificate)[1:]
    if not trusted:
        raise UsageError(
            f"{certificate} does not hold its issuer's certificate: name the coordinator's ca.pem "
            "with audit.authority"
        )
    return Door(
        address=chosen.audit.listen,
        certificate=certificate.read_bytes(),
        key=Path(chosen.server.key).read_bytes(),
        authority=pki.to_pem(trusted),
        auditors={one.certificate_sha256: one.name for one in chosen.auditors},
    )


def begun(chosen: Federation, agreed: Contract, door: Door) -> AuditServer:
    """Returns the service of a federation, answering."""
    out = Path(chosen.server.out)
    state = checkpoint.load(out / "checkpoint", agreed.sha256)
    # Before anyone asks: lines after the checkpoint are of a round that is run again.
    received.settle(out, attempts=state.attempts if state else 0)
    witness = keys.load(Path(chosen.server.witness_key))
    started = AuditServer(door, Disclosure(out, agreed, witness))
    started.start()
    return started


class _Answers(audit_pb2_grpc.AuditServicer):
    """The service's methods; each is a question to the disclosure."""

    def __init__(self, disclosure: Disclosure) -> None:
        self._disclosure = disclosure

    def Contracts(self, request: Any, context: Any) -> Iterator[pb.Contract]:
        """Yields the contract."""
        yield pb.Contract(signed=self._disclosure.contract())

    def Heads(self, request: Any, context: Any) -> Iterator[pb.Head]:
        """Yields each site's head."""
        for seen in self._disclosure.heads():
            yield pb.Head(
                site=seen.site,
                domain=seen.domain,
                sequence=seen.sequence,
                hash=bytes.fromhex(seen.hash),
                witness=seen.to_bytes(),
            )

    def Entries(self, request: pb.EntriesRequest, context: Any) -> Iterator[pb.Entry]:
        """Yields a site's entries."""
        for found in _known(self._disclosure.entries(request.site), context):
            if isinstance(found, Witness):
                yield pb.Entry(since=found.to_bytes())
            else:
                number, link = found
                yield pb.Entry(
                    link=pb.Link(sequence=number, body_hash=link.body_hash, body=link.body)
                )

    def Updates(self, request: pb.UpdatesRequest, context: Any) -> Iterator[pb.Update]:
        """Yields what came with a site's updates."""
        for found in _known(self._disclosure.updates(request.site), context):
            yield pb.Update(received=found.to_bytes())

    def Consistency(self, request: pb.ConsistencyRequest, context: Any) -> Iterator[pb.Link]:
        """Yields the hashes between two heads."""
        between = self._disclosure.between(
            request.site, request.domain, request.first, request.second
        )
        for number, link in _known(between, context):
            yield pb.Link(sequence=number, body_hash=link.body_hash)


class _Listed(grpc.ServerInterceptor):  # type: ignore[misc]  # gRPC has no types
    """Lets listed certificates through, and tells others what is missing."""

    def __init__(self, auditors: Mapping[str, str]) -> None:
        self._auditors = auditors

    def intercept_service(self, continuation: Callable[[Any], Any], details: Any) -> Any:
        """Returns the method's handler behind the check of who calls."""
        handler = continuation(details)
        if handler is None:
            return None
        shape = f"{_WORDS[handler.request_streaming]}_{_WORDS[handler.response_streaming]}"
        behaviour = getattr(handler, shape)

        def checked(request: Any, context: Any) -> Any:
            self._check(context)
            return behaviour(request, context)

        return getattr(grpc, f"{shape}_rpc_method_handler")(
            checked,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    def _check(self, context: Any) -> None:
        shown = context.auth_context().get("x509_pem_cert", [])
        if not shown:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "no certificate was shown")
        certificate = x509.load_pem_x509_certificate(shown[0])
        sha256 = pki.fingerprint(certificate)
        name = self._auditors.get(sha256)
        if name is None:
            logger.warning("refused a caller that is no auditor", extra={"event": "no-auditor"})
            context.abort(
                grpc.StatusCode.PERMISSION_DENIED,
                f"the certificate {sha256} is no listed auditor's: the coordinator lists it in "
                "FEDERATION.toml under [[auditors]], and starts the server again",
            )
        logger.info("an auditor asks", extra={"event": "auditor", "auditor": name})


_WORDS = {False: "unary", True: "stream"}


def _known(found: Iterator[Any], context: Any) -> Iterator[Any]:
    """Yields answers; a question for what is not there ends the call with one line."""
    try:
        yield from found
    except Unknown as error:
        context.abort(grpc.StatusCode.NOT_FOUND, str(error))
