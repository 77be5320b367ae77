"""Certificates by real handshakes over loopback, node keys by Flower's own loader."""

from __future__ import annotations

import argparse
import base64
import contextlib
import ipaddress
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hypothesis import given, settings
from hypothesis import strategies as st

from bract.shared import keyfiles, keys, node_keys, pki
from bract.shared.errors import UsageError

NOW = datetime.now(UTC)
CA = pki.new_authority()
HOSTS = ["fl.example.org", "10.0.0.7", "::1"]
SERVER = pki.issue_server(CA, HOSTS)
AUDITOR = pki.issue_auditor(CA, "erin")
NODE = node_keys.new()
Extension = TypeVar("Extension", bound=x509.ExtensionType)
LABELS = st.from_regex(r"[a-z0-9_]([a-z0-9_-]{0,20}[a-z0-9_])?", fullmatch=True)
NAMES = (
    st.lists(LABELS, min_size=1, max_size=4)
    .map(".".join)
    .filter(lambda name: not name.split(".")[-1].isdigit())
)


def files(identity: pki.Identity, folder: Path, name: str) -> tuple[Path, Path]:
    certificate, key = folder / f"{name}.pem", folder / f"{name}-key.pem"
    keyfiles.create(
        [
            keyfiles.public(certificate, identity.certificate_pem()),
            keyfiles.private(key, identity.key_pem()),
        ]
    )
    return certificate, key


def greet(
    folder: Path,
    host: str,
    *,
    server: pki.Identity = SERVER,
    trusts: pki.Identity = CA,
    client: pki.Identity | None = None,
    clients: pki.Identity | None = None,
) -> list[Exception]:
    """What went wrong, at the client and at the server, while each sent the other a word."""
    ours = ssl.create_default_context(cafile=files(trusts, folder, "trusted")[0])
    ours.verify_flags |= ssl.VERIFY_X509_STRICT  # Python's default from 3.13 on
    theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    theirs.load_cert_chain(*files(server, folder, "server"))
    if client is not None:
        ours.load_cert_chain(*files(client, folder, "client"))
    if clients is not None:
        theirs.verify_mode = ssl.CERT_REQUIRED
        theirs.verify_flags |= ssl.VERIFY_X509_STRICT
        theirs.load_verify_locations(files(clients, folder, "clients")[0])
    wrong: list[Exception] = []

    def serve(listener: socket.socket) -> None:
        try:
            plain, _ = listener.accept()
            with plain, theirs.wrap_socket(plain, server_side=True) as talk:
                talk.sendall(talk.recv(5))
        except OSError as error:
            wrong.append(error)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(20)
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        try:
            with (
                socket.create_connection(listener.getsockname(), timeout=20) as plain,
                ours.wrap_socket(plain, server_hostname=host) as talk,
            ):
                talk.sendall(b"hello")
                if talk.recv(5) != b"hello":
                    wrong.append(ConnectionError("no answer"))
        except OSError as error:
            wrong.append(error)
        thread.join()
    return wrong


def extension(certificate: x509.Certificate, kind: type[Extension]) -> Extension:
    return certificate.extensions.get_extension_for_class(kind).value


@pytest.mark.parametrize("host", [*HOSTS, "FL.example.org"])
def test_a_site_accepts_every_host_of_the_certificate(tmp_path: Path, host: str) -> None:
    assert greet(tmp_path, host) == []


@pytest.mark.parametrize("host", ["example.org", "x.fl.example.org", "10.0.0.8", "::2"])
def test_a_site_refuses_another_host(tmp_path: Path, host: str) -> None:
    assert any("mismatch" in str(error) for error in greet(tmp_path, host))


def test_a_site_refuses_an_expired_certificate(tmp_path: Path) -> None:
    before = datetime.now(UTC) - timedelta(days=3)
    authority = pki.new_authority(now=before)
    ended = pki.issue_server(authority, HOSTS, days=2, now=before)
    wrong = greet(tmp_path, HOSTS[0], server=ended, trusts=authority)
    assert any("certificate has expired" in str(error) for error in wrong)


def test_a_site_refuses_another_authority(tmp_path: Path) -> None:
    wrong = greet(tmp_path, HOSTS[0], trusts=pki.new_authority())
    assert any("CERTIFICATE_VERIFY_FAILED" in str(error) for error in wrong)


def test_a_site_whose_clock_is_a_little_behind_accepts(tmp_path: Path) -> None:
    ahead = datetime.now(UTC) + timedelta(minutes=4)
    authority = pki.new_authority(now=ahead)
    server = pki.issue_server(authority, HOSTS, now=ahead)
    assert greet(tmp_path, HOSTS[0], server=server, trusts=authority) == []


def test_a_site_refuses_a_server_with_an_auditors_certificate(tmp_path: Path) -> None:
    wrong = greet(tmp_path, HOSTS[0], server=AUDITOR)
    assert any("CERTIFICATE_VERIFY_FAILED" in str(error) for error in wrong)


def test_an_auditor_is_let_in(tmp_path: Path) -> None:
    assert greet(tmp_path, HOSTS[0], client=AUDITOR, clients=CA) == []


@pytest.mark.parametrize("stranger", ["nobody", "server", "other authority"])
def test_nobody_else_is_let_in_as_an_auditor(tmp_path: Path, stranger: str) -> None:
    client = {
        "nobody": None,
        "server": SERVER,
        "other authority": pki.issue_auditor(pki.new_authority(), "erin"),
    }[stranger]
    wrong = greet(tmp_path, HOSTS[0], client=client, clients=CA)
    reason = "CERTIFICATE_VERIFY_FAILED" if client else "PEER_DID_NOT_RETURN_A_CERTIFICATE"
    assert any(reason in str(error) for error in wrong)


def test_an_authority_cannot_make_another(tmp_path: Path) -> None:
    forged = pki.issue_server(SERVER, ["evil.example.org"], days=1)  # with a stolen server key
    wrong = greet(tmp_path, "evil.example.org", server=forged)
    assert any("CERTIFICATE_VERIFY_FAILED" in str(error) for error in wrong)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
@pytest.mark.parametrize(
    ("identity", "purpose", "host", "code"),
    [
        (SERVER, "sslserver", ["-verify_hostname", "fl.example.org"], 0),
        (SERVER, "sslserver", ["-verify_ip", "10.0.0.7"], 0),
        (SERVER, "sslserver", ["-verify_ip", "10.0.0.8"], 2),
        (SERVER, "sslclient", [], 2),
        (AUDITOR, "sslclient", [], 0),
        (AUDITOR, "sslserver", [], 2),
    ],
    ids=["host", "address", "other address", "server as client", "client", "client as server"],
)
def test_openssl_agrees(
    tmp_path: Path, identity: pki.Identity, purpose: str, host: list[str], code: int
) -> None:
    trusted, _ = files(CA, tmp_path, "ca")
    shown, _ = files(identity, tmp_path, "shown")
    command = ["openssl", "verify", "-x509_strict", "-purpose", purpose, *host]
    done = subprocess.run([*command, "-CAfile", trusted, shown], capture_output=True, check=False)
    assert done.returncode == code, done


def test_certificates_say_what_they_are_for() -> None:
    authority, server, auditor = (i.certificate for i in (CA, SERVER, AUDITOR))
    assert extension(authority, x509.BasicConstraints) == x509.BasicConstraints(True, 0)
    assert extension(authority, x509.KeyUsage).key_cert_sign
    for issued in (server, auditor):
        assert extension(issued, x509.BasicConstraints) == x509.BasicConstraints(False, None)
        assert not extension(issued, x509.KeyUsage).key_cert_sign
        identifier = extension(issued, x509.AuthorityKeyIdentifier).key_identifier
        assert identifier == extension(authority, x509.SubjectKeyIdentifier).digest
        issued.verify_directly_issued_by(authority)
    for certificate in (authority, server, auditor):
        assert isinstance(certificate.signature_hash_algorithm, hashes.SHA384)
        public = certificate.public_key()
        assert isinstance(public, ec.EllipticCurvePublicKey)
        assert isinstance(public.curve, ec.SECP384R1)
    assert len({c.serial_number for c in (authority, server, auditor)}) == 3
    assert auditor.subject.rfc4514_string() == "CN=erin"


def test_certificates_last_as_long_as_asked() -> None:
    authority = pki.new_authority(now=NOW).certificate
    day = NOW.replace(microsecond=0)
    assert authority.not_valid_after_utc == day + timedelta(days=5 * 365)
    server = pki.issue_server(CA, ["a"], days=30, now=NOW).certificate
    assert server.not_valid_after_utc == day + timedelta(days=30)
    assert day - timedelta(minutes=5) <= server.not_valid_before_utc < day


@pytest.mark.parametrize("days", [0, -1, 10**6, 10**30])
def test_days_out_of_range_are_refused(days: int) -> None:
    with pytest.raises(UsageError, match="must be from 1 to 36500"):
        pki.new_authority(days=days)
    with pytest.raises(UsageError, match="must be from 1 to 36500"):
        pki.issue_server(CA, ["a"], days=days)


def test_no_certificate_outlives_its_authority() -> None:
    authority = pki.new_authority(days=10, now=NOW)
    with pytest.raises(UsageError, match=r"11 days would outlive .* give --days 9 at most"):
        pki.issue_server(authority, ["a"], days=11, now=NOW)
    with pytest.raises(UsageError, match="make a new authority"):
        pki.issue_auditor(authority, "erin", days=1, now=NOW + timedelta(days=9, hours=1))
    pki.issue_server(authority, ["a"], days=9, now=NOW)


@given(
    names=st.lists(NAMES, max_size=3),
    addresses=st.lists(st.ip_addresses(v=4) | st.ip_addresses(v=6), max_size=3),
)
@settings(deadline=None, max_examples=50)
def test_names_and_addresses_go_where_they_belong(
    names: list[str], addresses: Sequence[ipaddress.IPv4Address | ipaddress.IPv6Address]
) -> None:
    hosts = [*names, *map(str, addresses)] or ["a"]
    certificate = pki.issue_server(CA, hosts).certificate
    alternatives = extension(certificate, x509.SubjectAlternativeName)
    dns, ip = list(dict.fromkeys(names)), list(dict.fromkeys(addresses))
    assert alternatives.get_values_for_type(x509.DNSName) == (dns or ([] if ip else ["a"]))
    assert alternatives.get_values_for_type(x509.IPAddress) == ip
    assert len(pki.hosts_of(certificate)) == max(1, len(dns) + len(ip))


@pytest.mark.parametrize(
    "host",
    [
        "",
        ".",
        "a..b",
        "a.",
        "-a",
        "a-",
        "*.example.org",
        "https://a",
        "a:8000",
        "[::1]",
        "fe80::1%eth0",
        "10.0.0.256",
        "10.0.0",
        "010.0.0.1",
        "münchen.de",
        "a b",
        "a\n",
        "a" * 64,
        ".".join(["a" * 50] * 6),
    ],
)
def test_what_is_no_host_is_refused(host: str) -> None:
    with pytest.raises(UsageError, match="host"):
        pki.issue_server(CA, [host])


def test_a_server_without_hosts_and_an_auditor_without_a_name_are_refused() -> None:
    with pytest.raises(UsageError, match="at least one host"):
        pki.issue_server(CA, [])
    for name in ("", "a" * 65):
        with pytest.raises(UsageError, match="1 to 64 characters"):
            pki.issue_auditor(CA, name)


def test_an_authority_is_read_again_and_signs(tmp_path: Path) -> None:
    read = pki.load_authority(*files(CA, tmp_path, "ca"))
    issued = pki.issue_server(read, HOSTS)
    assert greet(tmp_path, HOSTS[0], server=issued) == []


def test_what_is_no_authority_is_refused(tmp_path: Path) -> None:
    certificate, key = files(CA, tmp_path, "ca")
    server, server_key = files(SERVER, tmp_path, "s")
    keys.save(keys.generate(), tmp_path / "signing.pem")
    for pair, message in {
        (server, server_key): "may not sign",
        (certificate, server_key): "not the key of",
        (certificate, tmp_path / "signing.pem"): "another kind of key",
        (certificate, certificate): "holds no private key",
        (key, key): "holds no readable certificate",
        (tmp_path / "none.pem", key): "cannot read .*none.pem: No such file",
        (tmp_path, key): "cannot read .*: Is a directory",
    }.items():
        with pytest.raises(UsageError, match=message):
            pki.load_authority(*pair)


def test_a_key_behind_a_password_is_refused_without_asking(tmp_path: Path) -> None:
    locked = SERVER.key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"word"),
    )
    (tmp_path / "key").write_bytes(locked)
    with pytest.raises(UsageError, match="or a password protects it"):
        pki.load_private_key(tmp_path / "key")
    if shutil.which("ssh-keygen"):
        keyfiles.create([keyfiles.private(tmp_path / "node", node_keys.to_pem(NODE))])
        command = ["ssh-keygen", "-p", "-N", "word", "-f", tmp_path / "node"]
        subprocess.run(command, capture_output=True, check=True)
        with pytest.raises(UsageError, match="or a password protects it"):
            node_keys.load(tmp_path / "node")


@given(
    whole=st.sampled_from(
        [
            SERVER.certificate_pem(),
            SERVER.key_pem(),
            node_keys.to_pem(NODE),
            node_keys.public_line(NODE.public_key()).encode(),
        ]
    ),
    place=st.floats(0, 1, exclude_max=True),
    other=st.sampled_from([b"", b"A", b"b", b"0", b"/", b"=", b"-", b"\n", b"\0", b"\xff"]),
    cut=st.booleans(),
)
@settings(deadline=None, max_examples=200)
def test_broken_files_are_usage_errors(
    whole: bytes,
    place: float,
    other: bytes,
    cut: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    index = int(place * len(whole))
    path = tmp_path_factory.getbasetemp() / "broken"
    path.write_bytes(whole[:index] + other + (b"" if cut else whole[index + 1 :]))
    for load in (pki.certificates, pki.load_private_key, node_keys.load):
        with contextlib.suppress(UsageError):
            load(path)
    with contextlib.suppress(UsageError):
        node_keys.public(path.read_bytes().decode(errors="replace"))


def test_flowers_supernode_takes_the_node_key(tmp_path: Path) -> None:
    from flwr.supernode.cli.flower_supernode import _try_setup_client_authentication

    keyfiles.create([keyfiles.private(tmp_path / "node-key.pem", node_keys.to_pem(NODE))])
    arguments = argparse.Namespace(
        auth_supernode_private_key=str(tmp_path / "node-key.pem"), auth_supernode_public_key=None
    )
    pair = _try_setup_client_authentication(arguments)
    assert pair is not None
    private, public = pair
    assert public == node_keys.public(node_keys.public_line(NODE.public_key(), "north"))
    assert node_keys.load(tmp_path / "node-key.pem").private_numbers() == (
        private.private_numbers()
    )


def test_flowers_register_takes_the_public_line(tmp_path: Path) -> None:
    from flwr.cli.supernode.register import try_load_public_key

    (tmp_path / "node-key.pub").write_text(node_keys.public_line(NODE.public_key(), "north") + "\n")
    loaded = try_load_public_key(tmp_path / "node-key.pub")
    assert serialization.load_pem_public_key(loaded) == NODE.public_key()


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="needs ssh-keygen")
def test_openssh_reads_the_node_key(tmp_path: Path) -> None:
    keyfiles.create([keyfiles.private(tmp_path / "key", node_keys.to_pem(NODE))])
    command = ["ssh-keygen", "-y", "-f", tmp_path / "key"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == node_keys.public_line(NODE.public_key())


def test_other_node_keys_are_refused(tmp_path: Path) -> None:
    line = node_keys.public_line(NODE.public_key())
    smaller = ec.generate_private_key(ec.SECP256R1())
    blob = bytearray(base64.b64decode(line.split()[1]))
    blob[-97] = 2  # the first byte of the point: compressed, which OpenSSH never writes
    compressed = f"{node_keys.KIND} {base64.b64encode(blob).decode()}"
    for text, message in {
        node_keys.public_line(smaller.public_key()): "begins with ecdsa-sha2-nistp384",
        "ssh-ed25519 AAAA": "begins with ecdsa-sha2-nistp384",
        "": "begins with ecdsa-sha2-nistp384",
        f"{line}\n{line}": "must be one line",
        line[:60]: "no readable",
        compressed: "no readable",
        "ecdsa-sha2-nistp384": "no readable",
        node_keys.public_line(smaller.public_key()).replace("p256 ", "p384 "): "no readable",
    }.items():
        with pytest.raises(UsageError, match=message) as refused:
            node_keys.public(text, source="sites.0.node_key")
        assert str(refused.value).startswith("sites.0.node_key")
    others = {
        "p256": smaller,
        "rsa": rsa.generate_private_key(65537, 2048),
    }
    for name, key in others.items():
        pem = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.OpenSSH,
            serialization.NoEncryption(),
        )
        (tmp_path / name).write_bytes(pem)
        with pytest.raises(UsageError, match="another kind of key"):
            node_keys.load(tmp_path / name)
    files(SERVER, tmp_path, "server")
    with pytest.raises(UsageError, match="no node key in OpenSSH"):
        node_keys.load(tmp_path / "server-key.pem")


def test_an_identity_shows_no_private_key() -> None:
    assert "PrivateKey" not in repr(SERVER)
