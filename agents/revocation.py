"""Certificates that a fleet takes back before they end: its revocation list (CRL), made and read.

Law: files and X.509 only, as `agents.pki`. Who looks at the list during a handshake is OpenSSL (`transport.tls`); what
is read here is for whoever must find the connections that a new list ends.

A list of ours is valid as long as its CA: a fleet whose operators forget to renew a list must not stop. One that was
made elsewhere and has ended lets nobody in.

Source: RFC 5280, 5 (CRL profile).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa

from agents import pki
from agents.errors import PkiRefused

__all__ = ["CRL_NAME", "MAX_REVOKED", "RevocationList", "read_list", "revoke"]

CRL_NAME: Final = "ca.crl"
# Forty bytes each, in a file of at most pki.MAX_PEM_BYTES. A fleet that has taken back more needs a new CA.
MAX_REVOKED: Final = 10_000
_BLOCK: Final = re.compile(rb"-----BEGIN ([A-Z0-9 ]+)-----.*?-----END \1-----", re.DOTALL)
_SERIAL: Final = re.compile(r"[0-9a-f]{1,40}", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class RevocationList:
    """What a file of revocation lists says: serial numbers in hexadecimal, and when the first of the lists ends."""

    serials: frozenset[str]
    ends: datetime


def revoke(folder: Path, names: Sequence[str], serials: Sequence[str] = ()) -> RevocationList:
    """Add certificates to the list `ca.crl` in the CA's folder; with none the list is only made, or made anew.

    Args:
        names: identities, `agent/host-a`; what is revoked is the certificate of that name in the folder.
        serials: of certificates whose files are gone, in hexadecimal.

    Raises:
        PkiRefused: no usable CA in `folder`, no certificate of that name, too many, or the list cannot be written.
    """
    path = folder / CRL_NAME
    # A serial number of 20 bytes as `vmferry pki show` gives it.
    wanted = [_checked_serial(serial) for serial in serials] + [_serial_of(folder, name) for name in names]
    ca_certificate, ca_key = pki.load_ca(folder)
    now = datetime.now(UTC)
    old = _lists(path)[0] if path.exists() else None
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(ca_certificate.subject)
        .last_update(max(now - pki.CLOCK_SKEW, ca_certificate.not_valid_before_utc))
        .next_update(ca_certificate.not_valid_after_utc)
        .add_extension(x509.CRLNumber(int(now.timestamp() * 1000)), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False
        )
    )
    known: set[str] = set()
    for entry in old or ():
        known.add(f"{entry.serial_number:x}")
        builder = builder.add_revoked_certificate(entry)
    for serial in dict.fromkeys(wanted):
        if serial not in known:
            known.add(serial)
            builder = builder.add_revoked_certificate(
                x509.RevokedCertificateBuilder().serial_number(int(serial, 16)).revocation_date(now).build()
            )
    if len(known) > MAX_REVOKED:
        raise PkiRefused(f"a list of more than {MAX_REVOKED} certificates is not made: make a new CA instead")
    pki.replace_public(path, builder.sign(ca_key, hashes.SHA256()).public_bytes(pki.PEM))
    return RevocationList(serials=frozenset(known), ends=ca_certificate.not_valid_after_utc)


def read_list(path: Path, ca: Path, now: datetime | None = None) -> RevocationList:
    """Read the lists of a PEM file; there may be one of each CA in the file `ca`.

    Raises:
        PkiRefused: it cannot be read, has anything but lists in it, one is of no CA of the fleet or has ended, or a
            CA has none: OpenSSL lets nobody in whose certificate it cannot look up.
    """
    lists, issuers = _lists(path), pki.load_certificates(ca)
    for issuer in issuers:
        if not any(_is_of(crl, issuer) for crl in lists):
            raise PkiRefused(
                f"{path} has no list that {issuer.subject.rfc4514_string()} has signed; `vmferry pki revoke` makes one"
            )
    if not all(any(_is_of(crl, issuer) for issuer in issuers) for crl in lists):
        raise PkiRefused(f"{path} has a list that no CA in {ca} has signed")
    serials = frozenset(f"{entry.serial_number:x}" for crl in lists for entry in crl)
    ends = min(crl.next_update_utc or datetime.max.replace(tzinfo=UTC) for crl in lists)
    if ends <= (now or datetime.now(UTC)):
        raise PkiRefused(f"the list {path} ended on {ends:%Y-%m-%d}; `vmferry pki revoke` makes a new one")
    return RevocationList(serials=serials, ends=ends)


def _lists(path: Path) -> list[x509.CertificateRevocationList]:
    content = pki.read_pem(path)
    blocks = list(_BLOCK.finditer(content))
    # A certificate in this file would be taken for a CA by OpenSSL, which loads both from any file.
    if not blocks or any(block[1] != b"X509 CRL" for block in blocks):
        raise PkiRefused(
            f"{path} is no file of revocation lists: it must have blocks of X509 CRL, and nothing else"
        )
    try:
        return [_read_whole(x509.load_pem_x509_crl(block[0])) for block in blocks]
    except (ValueError, UnsupportedAlgorithm) as exc:
        raise PkiRefused(f"{path} holds no revocation list that can be read") from exc


def _read_whole(crl: x509.CertificateRevocationList) -> x509.CertificateRevocationList:
    """Look at all that is used of it, now: cryptography reads names, dates and entries when they are asked for."""
    _ = crl.issuer, crl.next_update_utc, [entry.serial_number for entry in crl]
    return crl


def _is_of(crl: x509.CertificateRevocationList, issuer: x509.Certificate) -> bool:
    key = issuer.public_key()
    if crl.issuer != issuer.subject or not isinstance(
        key, ec.EllipticCurvePublicKey | rsa.RSAPublicKey | ed25519.Ed25519PublicKey | ed448.Ed448PublicKey
    ):
        return False
    try:
        return crl.is_signature_valid(key)
    except (ValueError, UnsupportedAlgorithm):
        return False  # signed with what no CA of ours signs with


def _serial_of(folder: Path, name: str) -> str:
    role, slash, short = name.partition("/")
    if not slash or role not in set(pki.Role) or not pki.NAME.fullmatch(short):
        raise PkiRefused(f"{name[:80]!r} is no identity: say agent/HOST or operator/NAME")
    facts = pki.describe(folder / f"{role}-{short}.crt")
    if (facts.role, facts.name) != (role, short):
        raise PkiRefused(f"{folder / f'{role}-{short}.crt'} is not the certificate of {name}")
    return facts.serial


def _checked_serial(serial: str) -> str:
    serial = serial.lower()
    if not _SERIAL.fullmatch(serial) or not int(serial, 16):
        raise PkiRefused(f"{serial[:80]!r} is no serial number: `vmferry pki show` gives it in hexadecimal")
    return f"{int(serial, 16):x}"
