"""`bract keys`: coordinator, server, site, auditor, show.

What is printed without --json is TOML, its notes as comments, so that it can be appended to a file.
Where one half is for the other side, that half is on stdout, to be sent, and one's own on stderr.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import click
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import TypeAdapter, ValidationError

from bract.shared import keyfiles, node_keys, pki
from bract.shared import keys as signing
from bract.shared.cli import AS_JSON, print_json
from bract.shared.errors import UsageError, VerificationFailed
from bract.shared.keyfiles import NewFile, private, public
from bract.shared.reports.keys import (
    AuditorKeys,
    CertificateFile,
    CoordinatorKeys,
    KeyFile,
    ServerKeys,
    ShownKeys,
    SiteKeys,
)
from bract.shared.terms import Name

OUT = click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="The folder of the new files.",
)
CA = click.option(
    "--ca",
    required=True,
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="The coordinator's folder: ca.pem, ca-key.pem.",
)
DAYS = click.option(
    "--days",
    type=int,
    default=pki.CERTIFICATE_DAYS,
    show_default=True,
    metavar="N",
    help="How long the certificate lasts.",
)


@click.group()
def keys() -> None:
    """Make and read certificates and keys."""


@keys.command(epilog="Example: bract keys coordinator --out pki")
@OUT
@click.option(
    "--days",
    type=int,
    default=pki.AUTHORITY_DAYS,
    show_default=True,
    metavar="N",
    help="How long the authority lasts.",
)
@AS_JSON
def coordinator(out: Path, days: int, as_json: bool) -> None:
    """Make an authority for certificates, and the key that signs contracts."""
    authority, key = pki.new_authority(days=days), signing.generate()
    files = [
        public(out / "ca.pem", authority.certificate_pem()),
        private(out / "ca-key.pem", authority.key_pem()),
        private(out / "coordinator.pem", signing.to_pem(key)),
    ]
    report = CoordinatorKeys(
        ca_file=str(files[0].path),
        ca_key_file=str(files[1].path),
        coordinator_key_file=str(files[2].path),
        coordinator=key.public,
        certificate_sha256=pki.fingerprint(authority.certificate),
        not_after=authority.certificate.not_valid_after_utc,
        toml="# SITE.toml of every site, above its tables; send it with ca.pem:\n"
        + _toml(coordinators=[key.public]),
        own_toml="# FEDERATION.toml, above its tables:\n"
        + _toml(coordinator_key=str(files[2].path.absolute())),
    )
    _finish(files, report, as_json)


@keys.command(epilog="Example: bract keys server --ca pki --host fl.example.org --out server-keys")
@CA
@click.option(
    "--host",
    "hosts",
    multiple=True,
    required=True,
    metavar="NAME_OR_IP",
    help="A DNS name or IP address by which sites reach the server; repeatable.",
)
@OUT
@DAYS
@AS_JSON
def server(ca: Path, hosts: tuple[str, ...], out: Path, days: int, as_json: bool) -> None:
    """Make the server's certificate, and the key that countersigns ledger heads."""
    identity, witness = pki.issue_server(_authority(ca), hosts, days=days), signing.generate()
    files = [
        public(out / "server.pem", identity.certificate_pem()),
        private(out / "server-key.pem", identity.key_pem()),
        private(out / "witness.pem", signing.to_pem(witness)),
    ]
    # Absolute: this command cannot know in which folder FEDERATION.toml will lie.
    certificate, key, witness_key = (str(file.path.absolute()) for file in files)
    report = ServerKeys(
        certificate_file=str(files[0].path),
        key_file=str(files[1].path),
        witness_key_file=str(files[2].path),
        witness=witness.public,
        hosts=pki.hosts_of(identity.certificate),
        certificate_sha256=pki.fingerprint(identity.certificate),
        not_after=identity.certificate.not_valid_after_utc,
        toml=f"# FEDERATION.toml; the witness's public key is {witness.public}\n[server]\n"
        + _toml(certificate=certificate, key=key, witness_key=witness_key),
    )
    _finish(files, report, as_json)


@keys.command(
    epilog="Example: bract keys site north --out site-keys --domain heart --nominal-size 300"
)
@click.argument("name")
@OUT
@click.option("--domain", metavar="D", help="The data whose privacy is counted.")
@click.option("--nominal-size", type=int, metavar="N", help="The site's public, nominal size.")
@AS_JSON
def site(name: str, out: Path, domain: str | None, nominal_size: int | None, as_json: bool) -> None:
    """Make a site's keys: one signs its ledger, one speaks to the server."""
    _check_name("NAME", name)
    if domain is not None:
        _check_name("--domain", domain)
    if nominal_size is not None and nominal_size < 1:
        raise UsageError(f"--nominal-size {nominal_size} must be at least 1")
    ledger, node = signing.generate(), node_keys.new()
    line = node_keys.public_line(node.public_key(), name)
    files = [
        private(out / "ledger.pem", signing.to_pem(ledger)),
        private(out / "node-key.pem", node_keys.to_pem(node)),
        public(out / "node-key.pub", f"{line}\n".encode()),
    ]
    # What is to be filled in is refused as it stands, so that it can't be forgotten.
    fragment = ["[[sites]]\n", _toml(name=name, key=ledger.public, node_key=line)]
    fragment += [] if domain else ["# TO FILL IN: the data whose privacy is counted\n"]
    fragment += [_toml(domain=domain or "")]
    fragment += [] if nominal_size else ["# TO FILL IN: the public, nominal number of examples\n"]
    fragment += [_toml(nominal_size=nominal_size or 0)]
    report = SiteKeys(
        name=name,
        ledger_key_file=str(files[0].path),
        node_key_file=str(files[1].path),
        node_public_file=str(files[2].path),
        key=ledger.public,
        node_key=line,
        domain=domain,
        nominal_size=nominal_size,
        toml="# FEDERATION.toml, at the coordinator:\n" + "".join(fragment),
        own_toml="# SITE.toml, with the coordinator's ca.pem beside it:\n[keys]\n"
        + _toml(
            root_certificate="ca.pem",
            node=str(files[1].path.absolute()),
            ledger=str(files[0].path.absolute()),
        ),
    )
    _finish(files, report, as_json)


@keys.command(epilog="Example: bract keys auditor erin --ca pki --out auditor-keys")
@click.argument("name")
@CA
@OUT
@DAYS
@AS_JSON
def auditor(name: str, ca: Path, out: Path, days: int, as_json: bool) -> None:
    """Make an auditor's certificate, with which the server lets them read ledgers."""
    _check_name("NAME", name)
    identity = pki.issue_auditor(_authority(ca), name, days=days)
    sha256 = pki.fingerprint(identity.certificate)
    files = [
        public(out / "auditor.pem", identity.certificate_pem()),
        private(out / "auditor-key.pem", identity.key_pem()),
    ]
    report = AuditorKeys(
        name=name,
        certificate_file=str(files[0].path),
        key_file=str(files[1].path),
        certificate_sha256=sha256,
        not_after=identity.certificate.not_valid_after_utc,
        toml="# FEDERATION.toml, at the coordinator:\n[[auditors]]\n"
        + _toml(name=name, certificate_sha256=sha256),
    )
    _finish(files, report, as_json)


@keys.command(epilog="Example: bract keys show pki/*.pem site-keys/*")
@click.argument(
    "paths", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FILE..."
)
@AS_JSON
def show(paths: tuple[Path, ...], as_json: bool) -> None:
    """Say what each file is, by its public half; exit code 1 where a certificate has expired."""
    now = datetime.now(UTC)
    files = [shown for path in paths for shown in _described(path, now)]
    if as_json:
        print_json(ShownKeys(files=files).model_dump(mode="json"))
    else:
        for file in files:
            _print(file, now)
    expired = [file for file in files if isinstance(file, CertificateFile) and file.expired]
    if expired and as_json:
        click.get_current_context().exit(1)  # its one object is printed, and says which
    if expired:
        raise VerificationFailed(
            f"{expired[0].path} expired {expired[0].not_after:%F}: make a new one in a new folder"
        )


def _finish(files: Sequence[NewFile], report: Any, as_json: bool) -> None:
    keyfiles.create(files)
    if as_json:
        print_json(report.model_dump(mode="json"))
        return
    for file in files:
        kind = "secret" if file.mode == keyfiles.PRIVATE else "public"
        click.echo(f"{kind}  {file.path}", err=True)
    if isinstance(report, CoordinatorKeys | SiteKeys):
        click.echo(report.own_toml, nl=False, err=True)
    click.echo(report.toml, nl=False)


def _authority(folder: Path) -> pki.Identity:
    return pki.load_authority(folder / "ca.pem", folder / "ca-key.pem")


def _check_name(what: str, value: str) -> None:
    try:
        TypeAdapter(Name).validate_python(value)
    except ValidationError as error:
        raise UsageError(
            f"{what} {value!r} must be 1 to 200 letters, digits or any of . _ : @ = + -, "
            "and begin with a letter or a digit"
        ) from error


def _toml(**values: str | int | list[str]) -> str:
    return "".join(f"{key} = {_literal(value)}\n" for key, value in values.items())


def _literal(value: str | int | list[str]) -> str:
    # JSON's strings are TOML's, but for this one character.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _described(path: Path, now: datetime) -> list[CertificateFile | KeyFile]:
    data = pki.read(path)
    found: list[CertificateFile | KeyFile] = []
    if b"-----BEGIN CERTIFICATE-----" in data:
        found += [_certificate(path, one, now) for one in pki.certificates(path)]
    if b" PRIVATE KEY-----" in data:
        found.append(_private(path, data))
    if data.startswith(node_keys.KIND.encode()):
        line = data.decode(errors="replace").strip()
        node_keys.public(line, source=str(path))
        found.append(KeyFile(path=str(path), kind="node public key", public=line, warnings=[]))
    if not found:
        raise UsageError(f"{path} is neither a certificate nor a key of the kinds bract makes")
    return found


def _certificate(path: Path, one: x509.Certificate, now: datetime) -> CertificateFile:
    left = one.not_valid_after_utc - now
    return CertificateFile(
        path=str(path),
        subject=one.subject.rfc4514_string(),
        issuer=one.issuer.rfc4514_string(),
        hosts=pki.hosts_of(one),
        not_before=one.not_valid_before_utc,
        not_after=one.not_valid_after_utc,
        days_left=left.days,
        expired=left <= timedelta(0),
        sha256=pki.fingerprint(one),
        public=pki.key_fingerprint(one.public_key()),
        warnings=["not valid yet"] if now < one.not_valid_before_utc else [],
    )


def _private(path: Path, data: bytes) -> KeyFile:
    fault = keyfiles.openness(path)
    warnings = [] if fault is None else [fault]
    if b"-----BEGIN OPENSSH PRIVATE KEY-----" in data:
        line = node_keys.public_line(node_keys.load(path).public_key())
        return KeyFile(path=str(path), kind="node key", public=line, warnings=warnings)
    key = pki.load_private_key(path)
    if isinstance(key, Ed25519PrivateKey):
        half = key.public_key().public_bytes_raw().hex()
        return KeyFile(path=str(path), kind="signing key", public=half, warnings=warnings)
    half = pki.key_fingerprint(key.public_key())
    return KeyFile(path=str(path), kind="certificate key", public=half, warnings=warnings)


def _print(file: CertificateFile | KeyFile, now: datetime) -> None:
    click.echo(f"{file.path}: {file.kind}")
    if isinstance(file, CertificateFile):
        ago = f"EXPIRED {(now - file.not_after).days} days ago"
        state = ago if file.expired else f"{file.days_left} days left"
        click.echo(f"  subject    {file.subject}")
        if file.hosts:
            click.echo(f"  hosts      {', '.join(file.hosts)}")
        click.echo(f"  issuer     {'itself' if file.issuer == file.subject else file.issuer}")
        click.echo(f"  not after  {file.not_after:%F %R} UTC, {state}")
        click.echo(f"  sha256     {file.sha256}")
    hashed = file.kind in ("certificate", "certificate key")
    click.echo(f"  {'key sha256' if hashed else 'public':<10} {file.public}")
    for warning in file.warnings:
        click.echo(f"  warning    {warning}")
