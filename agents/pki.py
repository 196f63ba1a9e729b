"""A certificate authority of one fleet: who is an agent, who is an operator, proved by certificates.

Law: files and X.509 only; no socket, no TLS session (that is `transport.tls`). Identities are URIs in the
subject alternative name: `vmferry://agent/HOST` and `vmferry://operator/NAME`. Host names and addresses in a
certificate are for other tools' convenience; nothing here is decided by them.

Files: keys are 0600 from their first byte, appear whole or not at all, and replace nothing unless told to.

Source: RFC 5280 (4.2.1.3 key usage, 4.2.1.9 basic constraints, 4.2.1.12 extended key usage).
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import secrets
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from agents.errors import PkiRefused
from transport.identity import Role

__all__ = [
    "CLOCK_SKEW",
    "NAME",
    "PEM",
    "CertificateFacts",
    "IssuedFiles",
    "Role",
    "describe",
    "identity_problems",
    "identity_uri",
    "init_ca",
    "issue",
    "load_ca",
    "load_certificates",
    "read_pem",
    "replace_public",
]

PEM: Final = serialization.Encoding.PEM

# One label-like word: it is a file name, a URI path segment, a metric label and a word in sentences.
NAME: Final = re.compile(r"[a-z0-9][a-z0-9.-]{0,62}", re.ASCII)
# A chain of a few certificates is some kilobytes; more is not a certificate file.
MAX_PEM_BYTES: Final = 1 << 20
# Hosts of one fleet disagree about the time by less than this, or their logs are useless anyway.
CLOCK_SKEW: Final = timedelta(minutes=5)
MAX_DAYS: Final = 36500


@dataclass(frozen=True, slots=True, kw_only=True)
class IssuedFiles:
    """Where a new certificate and its key are."""

    certificate: Path
    key: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class CertificateFacts:
    """What one certificate says of itself; nothing of it is verified.

    `role` and `name` are None where the certificate carries no identity of ours, or more than one.
    `days_left` counts whole days and is negative after the end. `fingerprint` is SHA-256 over DER.
    """

    subject: str
    issuer: str
    uris: tuple[str, ...]
    addresses: tuple[str, ...]
    role: Role | None
    name: str | None
    is_ca: bool
    serial: str
    not_before: datetime
    not_after: datetime
    days_left: int
    fingerprint: str


def identity_uri(role: Role, name: str) -> str:
    """Give the URI that names an identity.

    Raises:
        PkiRefused: not a name.
    """
    return f"vmferry://{role}/{_checked_name(name)}"


def init_ca(folder: Path, name: str, days: int = 3650, *, force: bool = False) -> IssuedFiles:
    """Make a certificate authority: `ca.crt` and `ca.key` in `folder`, which is made (0700) if missing.

    Raises:
        PkiRefused: there is one already and `force` is false, a bad name or number of days, or the folder
            cannot be written.
    """
    if not 1 <= len(name) <= 64 or not name.isprintable():
        raise PkiRefused("the name of a CA has 1 to 64 printable characters")
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    certificate = (
        _builder(subject, subject, key.public_key(), now, now + _checked_days(days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(for_ca=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    files = IssuedFiles(certificate=folder / "ca.crt", key=folder / "ca.key")
    _write_pair(files, certificate, key, force=force)
    return files


def issue(
    folder: Path,
    role: Role,
    name: str,
    days: int = 365,
    addresses: Sequence[str] = (),
    *,
    force: bool = False,
) -> IssuedFiles:
    """Make a key and a certificate for one agent or operator, signed by the CA in `folder`.

    The files are `ROLE-NAME.crt` and `ROLE-NAME.key` in `folder`. The certificate never outlives its CA:
    it ends with it at the latest. `addresses` are host names and IP addresses.

    Raises:
        PkiRefused: no usable CA in `folder`, files of that name exist and `force` is false, a bad name,
            address or number of days, or the folder cannot be written.
    """
    uri = identity_uri(role, name)
    ca_certificate, ca_key = load_ca(folder)
    now = datetime.now(UTC)
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(uri)]
    names += [_address(address) for address in addresses]
    usages = [ExtendedKeyUsageOID.CLIENT_AUTH]
    if role is Role.AGENT:
        # An agent serves other agents and the command line, and is a client of the agents it moves guests to.
        usages.append(ExtendedKeyUsageOID.SERVER_AUTH)
    key = ec.generate_private_key(ec.SECP256R1())
    ends = min(now + _checked_days(days), ca_certificate.not_valid_after_utc)
    certificate = (
        _builder(
            x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]),
            ca_certificate.subject,
            key.public_key(),
            max(now - CLOCK_SKEW, ca_certificate.not_valid_before_utc),
            ends,
        )
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(for_ca=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False
        )
        .sign(ca_key, hashes.SHA256())
    )
    files = IssuedFiles(certificate=folder / f"{role}-{name}.crt", key=folder / f"{role}-{name}.key")
    _write_pair(files, certificate, key, force=force)
    return files


def load_ca(folder: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """Read the CA in `folder`, to sign with it.

    Raises:
        PkiRefused: there is none that can be used.
    """
    certificate = _one_certificate(folder / "ca.crt", "run `vmferry pki init` first")
    key = _private_key(folder / "ca.key")
    if certificate.public_key() != key.public_key():
        raise PkiRefused(f"{folder / 'ca.key'} is not the key of {folder / 'ca.crt'}")
    if certificate.not_valid_after_utc <= datetime.now(UTC):
        raise PkiRefused(
            f"the CA ended on {_day(certificate.not_valid_after_utc)}; make a new one with --force"
        )
    return certificate, key


def replace_public(path: Path, content: bytes) -> None:
    """Put a file that everybody may read in place of an older one, whole. Raises PkiRefused: it cannot be written."""
    try:
        _write_whole(path, content, mode=0o644, force=True)
    except OSError as exc:
        raise PkiRefused(f"cannot write {exc.filename or path}: {exc.strerror}") from exc


def describe(path: Path, now: datetime | None = None) -> CertificateFacts:
    """Read what the first certificate of a PEM file says. `now` is the moment that `days_left` counts from.

    Raises:
        PkiRefused: no certificate can be read there.
    """
    certificate = _one_certificate(path)
    try:
        return _facts(certificate, now or datetime.now(UTC))
    except (
        ValueError,
        UnsupportedAlgorithm,
        x509.DuplicateExtension,
        x509.UnsupportedGeneralNameType,
    ) as exc:
        raise PkiRefused(f"{path} is not a certificate that can be read: {exc}") from exc


def identity_problems(
    *, certificate: Path, key: Path, ca: Path, role: Role, name: str | None, now: datetime | None = None
) -> list[str]:
    """Say in plain words everything that keeps these three files from proving the identity; empty: nothing.

    `name` None accepts any name of the role.
    """
    now = now or datetime.now(UTC)
    problems: list[str] = []
    own: x509.Certificate | None = None
    try:
        own = _one_certificate(certificate)
        problems += _certificate_problems(certificate, describe(certificate, now), role, name, now)
    except PkiRefused as exc:
        problems.append(str(exc))
    try:
        problems += _key_problems(key, own)
    except PkiRefused as exc:
        problems.append(str(exc))
    try:
        if own is not None and not any(_is_issued_by(own, issuer) for issuer in load_certificates(ca)):
            problems.append(f"{certificate} was not issued by the CA in {ca}")
    except PkiRefused as exc:
        problems.append(str(exc))
    return problems


def _certificate_problems(
    path: Path, facts: CertificateFacts, role: Role, name: str | None, now: datetime
) -> Iterator[str]:
    if facts.role is None or facts.name is None:
        yield f"{path} carries no identity; issue one with `vmferry pki issue {role} {name or 'NAME'}`"
    elif facts.role is not role:
        yield f"{path} is for {_a(facts.role)}, and {_a(role)} is needed here"
    elif name is not None and facts.name != name:
        yield f"{path} is for {facts.role}/{facts.name}, but the configured name is {name!r}"
    if facts.not_after <= now:
        yield f"{path} expired on {_day(facts.not_after)}; issue a new one"
    if facts.not_before > now:
        yield f"{path} is not valid before {facts.not_before:%Y-%m-%d %H:%M} UTC; is this host's clock right?"


def _key_problems(path: Path, certificate: x509.Certificate | None) -> Iterator[str]:
    private = _private_key(path)
    status = path.stat()
    mode = stat.S_IMODE(status.st_mode)
    if mode & 0o077:
        yield f"{path} can be read by others (mode {mode:04o}); run chmod 600 on it"
    # Whoever owns the file may read and replace it, whatever its mode says.
    if status.st_uid not in (0, os.geteuid()):
        yield (
            f"{path} belongs to user {status.st_uid} (mode {mode:04o}), and this program runs as {os.geteuid()}; "
            f"run chown {os.geteuid()} on it"
        )
    if certificate is not None and certificate.public_key() != private.public_key():
        yield f"{path} is not the key of the certificate"


def _facts(certificate: x509.Certificate, now: datetime) -> CertificateFacts:
    uris: tuple[str, ...] = ()
    addresses: tuple[str, ...] = ()
    with contextlib.suppress(x509.ExtensionNotFound):
        alternatives = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = tuple(alternatives.get_values_for_type(x509.UniformResourceIdentifier))
        addresses = (
            *alternatives.get_values_for_type(x509.DNSName),
            *(str(address) for address in alternatives.get_values_for_type(x509.IPAddress)),
        )
    is_ca = False
    with contextlib.suppress(x509.ExtensionNotFound):
        is_ca = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    role, name = _identity(uris)
    return CertificateFacts(
        subject=certificate.subject.rfc4514_string(),
        issuer=certificate.issuer.rfc4514_string(),
        uris=uris,
        addresses=addresses,
        role=role,
        name=name,
        is_ca=is_ca,
        serial=f"{certificate.serial_number:x}",
        not_before=certificate.not_valid_before_utc,
        not_after=certificate.not_valid_after_utc,
        days_left=(certificate.not_valid_after_utc - now).days,
        fingerprint=certificate.fingerprint(hashes.SHA256()).hex(":"),
    )


def _identity(uris: Sequence[str]) -> tuple[Role | None, str | None]:
    """Two identities in one certificate are none: it would depend on the reader which one counts."""
    ours = [uri for uri in uris if uri.startswith("vmferry:")]
    if len(ours) == 1:
        for role in Role:
            name = ours[0].removeprefix(f"vmferry://{role}/")
            if name != ours[0] and NAME.fullmatch(name):
                return role, name
    return None, None


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public_key: ec.EllipticCurvePublicKey,
    not_before: datetime,
    not_after: datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(not_before)
        .not_valid_after(not_after)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _key_usage(*, for_ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not for_ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=for_ca,
        crl_sign=for_ca,
        encipher_only=False,
        decipher_only=False,
    )


def _checked_name(name: str) -> str:
    if not NAME.fullmatch(name):
        raise PkiRefused(
            f"{name[:80]!r} is not a name: use 1 to 63 of a-z 0-9 . - and begin with a letter or a digit"
        )
    return name


def _checked_days(days: int) -> timedelta:
    if not 1 <= days <= MAX_DAYS:
        raise PkiRefused(f"a certificate is valid for 1 to {MAX_DAYS} days, not for {days}")
    return timedelta(days=days)


def _address(address: str) -> x509.GeneralName:
    with contextlib.suppress(ValueError):
        return x509.IPAddress(ipaddress.ip_address(address))
    labels = address.removeprefix("*.").split(".")
    if len(address) > 253 or not all(
        re.fullmatch(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)", label, re.ASCII) for label in labels
    ):
        raise PkiRefused(f"{address[:80]!r} is neither a host name nor an IP address")
    return x509.DNSName(address)


def _is_issued_by(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def load_certificates(path: Path) -> list[x509.Certificate]:
    """Read all certificates of a PEM file. Raises PkiRefused: there is none that can be read."""
    try:
        return x509.load_pem_x509_certificates(read_pem(path))
    except (ValueError, UnsupportedAlgorithm) as exc:
        raise PkiRefused(f"{path} holds no PEM certificate that can be read") from exc


def _one_certificate(path: Path, remedy: str = "") -> x509.Certificate:
    try:
        return load_certificates(path)[0]
    except PkiRefused as exc:
        if remedy:
            raise PkiRefused(f"{exc}; {remedy}") from exc
        raise


def _private_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(read_pem(path), password=None)
    except TypeError as exc:
        raise PkiRefused(f"{path} is encrypted; an agent has nobody to ask for its password") from exc
    except (ValueError, UnsupportedAlgorithm) as exc:
        raise PkiRefused(f"{path} holds no PEM private key that can be read") from exc
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise PkiRefused(f"{path} is not an elliptic-curve key; issue it with `vmferry pki issue`")
    return key


def read_pem(path: Path) -> bytes:
    """Read a file that is no larger than certificates and keys are. Raises PkiRefused: it cannot be, or is."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_PEM_BYTES + 1)
    except OSError as exc:
        raise PkiRefused(f"cannot read {path}: {exc.strerror}") from exc
    if len(content) > MAX_PEM_BYTES:
        raise PkiRefused(f"{path} is larger than {MAX_PEM_BYTES} bytes: not a certificate or key")
    return content


def _write_pair(
    files: IssuedFiles, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey, *, force: bool
) -> None:
    """Write the key, then the certificate: whoever sees a new certificate finds its key."""
    key_pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    try:
        files.key.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in (files.certificate, files.key):
            if path.exists() and not force:
                raise FileExistsError(path)
        _write_whole(files.key, key_pem, mode=0o600, force=force)
        try:
            _write_whole(
                files.certificate,
                certificate.public_bytes(serialization.Encoding.PEM),
                mode=0o644,
                force=force,
            )
        except OSError:
            if not force:
                files.key.unlink()
            raise
    except FileExistsError as exc:
        raise PkiRefused(f"{exc.filename or exc.args[0]} exists; it is replaced only with --force") from exc
    except OSError as exc:
        raise PkiRefused(f"cannot write {exc.filename or files.key}: {exc.strerror}") from exc


def _write_whole(path: Path, content: bytes, *, mode: int, force: bool) -> None:
    """Make the file durable under a temporary name, then give it its own: never half, never too open."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if force:
            temporary.replace(path)
        else:
            # link(2) refuses to replace, and does so atomically; rename(2) does not.
            path.hardlink_to(temporary)
    finally:
        temporary.unlink(missing_ok=True)


def _a(role: Role) -> str:
    return f"an {role}"


def _day(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d}"
