"""Who the other side is: identities in certificates, and TLS contexts that ask for them.

An identity is one URI in the subject alternative name, `vmferry://agent/HOST` or `vmferry://operator/NAME`. A
certificate with none or several of ours names nobody. Host names and addresses in a certificate decide nothing:
an address may be reached through a tunnel or change, a host's identity does not.

Law: no socket and no event loop; contexts, certificates and sentences. TLS 1.3 only, certificates on both sides.
"""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Final

from transport.errors import LocalMisuse, UntrustedPeer
from transport.identity import SCHEME, Identity, Role, parse_identity

__all__ = [
    "Identity",
    "Role",
    "client_context",
    "identity_in",
    "parse_identity",
    "serial_in",
    "server_context",
    "tls_words",
]


def server_context(certificate: Path, key: Path, ca: Path, crl: Path | None = None) -> ssl.SSLContext:
    """Make the context of a side that is called. Raises LocalMisuse: a file cannot be used; it says which."""
    return _context(ssl.PROTOCOL_TLS_SERVER, certificate, key, ca, crl)


def client_context(certificate: Path, key: Path, ca: Path, crl: Path | None = None) -> ssl.SSLContext:
    """Make the context of a side that calls. Raises LocalMisuse: a file cannot be used; it says which."""
    return _context(ssl.PROTOCOL_TLS_CLIENT, certificate, key, ca, crl)


def _context(protocol: int, certificate: Path, key: Path, ca: Path, crl: Path | None) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    # The identity in the certificate is checked instead, on both sides, by `identity_in`.
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    # A resumed session would skip the look at certificates that may have expired since.
    context.options |= ssl.OP_NO_TICKET
    if protocol == ssl.PROTOCOL_TLS_SERVER:
        context.num_tickets = 0
    try:
        context.load_cert_chain(certificate, key)
    except (ssl.SSLError, OSError) as exc:
        raise LocalMisuse(f"certificate {certificate} and key {key} cannot be used together: {exc}") from exc
    try:
        context.load_verify_locations(ca)
    except (ssl.SSLError, OSError) as exc:
        raise LocalMisuse(f"CA certificate {ca} cannot be used: {exc}") from exc
    if crl is not None:
        try:
            # The one call that loads lists; `agents.revocation` makes sure that no certificate is in the file.
            context.load_verify_locations(crl)
        except (ssl.SSLError, OSError) as exc:
            raise LocalMisuse(f"revocation list {crl} cannot be used: {exc}") from exc
        context.verify_flags |= ssl.VerifyFlags.VERIFY_CRL_CHECK_LEAF
    return context


def identity_in(certificate: object) -> Identity:
    """Find the identity in a verified certificate, as `getpeercert()` gives it.

    Raises:
        UntrustedPeer: no certificate, or not exactly one identity in it.
    """
    names = certificate.get("subjectAltName", ()) if isinstance(certificate, dict) else ()
    uris = [value for kind, value in names if kind == "URI" and value.startswith(SCHEME)]
    if not uris:
        raise UntrustedPeer("the certificate carries no vmferry:// URI: it was issued for something else")
    if len(uris) > 1:
        raise UntrustedPeer(f"the certificate names {len(uris)} identities, one is allowed")
    return parse_identity(uris[0])


def serial_in(certificate: object) -> str:
    """Find the serial number in a verified certificate, in hexadecimal as `vmferry pki show` gives it."""
    serial = certificate.get("serialNumber", "") if isinstance(certificate, dict) else ""
    return str(serial).lower().lstrip("0")


# Reasons of OpenSSL -> words. First, what this side found wrong with the peer's certificate (X509_V_ERR_*).
_VERIFY_WORDS: Final = {
    3: "cannot be looked up: the revocation list has nothing of its CA",
    9: "is not valid yet: compare the clocks of both hosts",
    10: "has expired: issue a new one",
    11: "cannot be looked up: the revocation list is not valid yet; compare the clocks",
    12: "cannot be looked up: the revocation list has ended; make a new one",
    18: "is signed by itself and not by this fleet's CA",
    19: "was issued by another CA",
    20: "was issued by another CA",
    21: "was issued by another CA",
    23: "was revoked",
    26: "was not issued for this purpose (its extended key usage)",
}
# Then alerts with which the peer has told what it found wrong with ours. "SSLV3_" and "TLSV1_" are only the
# protocol that an alert first stood in.
_ALERT_WORDS: Final = {
    "CERTIFICATE_EXPIRED": "it has expired, or is not valid yet: issue a new one and compare the clocks",
    "UNKNOWN_CA": "it was issued by another CA",
    "CERTIFICATE_REQUIRED": "none was given",
    "BAD_CERTIFICATE": "it cannot be read",
    "UNSUPPORTED_CERTIFICATE": "it was not issued for this purpose (its extended key usage)",
    "CERTIFICATE_REVOKED": "it was revoked",
    "CERTIFICATE_UNKNOWN": "it gave no reason",
    "ACCESS_DENIED": "it gave no reason",
    "DECRYPT_ERROR": "its signature is wrong",
}


def tls_words(error: ssl.SSLError) -> str | None:
    """Say a failed handshake in plain words; None when certificates had nothing to do with it."""
    if isinstance(error, ssl.SSLCertVerificationError):
        words = _VERIFY_WORDS.get(error.verify_code, f"was not accepted: {error.verify_message}")
        return f"the peer's certificate {words}"
    # Errors that Python and not OpenSSL has made have no reason.
    reason: str = getattr(error, "reason", None) or ""
    if reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
        return "the peer gave no certificate"
    for alert, words in _ALERT_WORDS.items():
        if reason.endswith(f"ALERT_{alert}"):
            return f"the peer did not accept this side's certificate: {words}"
    return None
