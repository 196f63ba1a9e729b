"""Identities, and contexts that say what is wrong with their files."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.transport.certificates import Authority
from transport.errors import LocalMisuse, UntrustedPeer
from transport.tls import (
    Identity,
    Role,
    client_context,
    identity_in,
    parse_identity,
    server_context,
    tls_words,
)

names = st.from_regex(r"[a-z0-9][a-z0-9.-]{0,62}", fullmatch=True)


@settings(deadline=None)
@given(st.sampled_from(Role), names)
def test_an_identity_comes_back_from_its_uri(role: Role, name: str) -> None:
    identity = Identity(role=role, name=name)
    assert parse_identity(identity.uri) == identity
    assert identity.uri == f"vmferry://{identity}"


@settings(deadline=None)
@given(st.text(max_size=100) | st.text(max_size=50).map("vmferry://".__add__))
def test_garbage_raises_only_untrusted_peer(uri: str) -> None:
    try:
        identity = parse_identity(uri)
    except UntrustedPeer:
        return
    assert identity.uri == uri


@pytest.mark.parametrize("length", [63, 64])
def test_a_name_has_63_characters_at_most(length: int) -> None:
    uri = f"vmferry://agent/{'a' * length}"
    if length == 63:
        assert parse_identity(uri).name == "a" * 63
    else:
        with pytest.raises(UntrustedPeer):
            parse_identity(uri)


@pytest.mark.parametrize("certificate", [None, {}, {"subjectAltName": (("DNS", "vmferry://agent/a"),)}])
def test_a_certificate_without_a_uri_of_ours_names_nobody(certificate: object) -> None:
    with pytest.raises(UntrustedPeer, match="no vmferry:// URI"):
        identity_in(certificate)


def test_a_uri_of_others_beside_ours_does_no_harm() -> None:
    names = (("URI", "spiffe://x/y"), ("URI", "vmferry://operator/eve"), ("DNS", "host"))
    assert identity_in({"subjectAltName": names}) == Identity(role=Role.OPERATOR, name="eve")


@pytest.mark.parametrize("make", [server_context, client_context])
def test_a_context_speaks_tls_1_3_only_and_asks_for_a_certificate(
    tmp_path: Path, make: Callable[[Path, Path, Path], ssl.SSLContext]
) -> None:
    files = Authority(tmp_path, "ca").issue("vmferry://agent/a")
    context = make(files.certificate, files.key, files.ca)
    assert context.minimum_version is ssl.TLSVersion.TLSv1_3
    assert context.verify_mode is ssl.CERT_REQUIRED


def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    authority = Authority(tmp_path, "ca")
    one, other = authority.issue("vmferry://agent/a"), authority.issue("vmferry://agent/b")
    with pytest.raises(LocalMisuse, match=other.key.name):
        server_context(one.certificate, other.key, one.ca)
    with pytest.raises(LocalMisuse, match=r"no-such\.crt"):
        client_context(one.certificate, one.key, tmp_path / "no-such.crt")


def test_a_failure_that_is_none_of_certificates_has_no_words_for_them() -> None:
    assert tls_words(ssl.SSLError(1, "[SSL: WRONG_VERSION_NUMBER] wrong version number")) is None
