from __future__ import annotations

import os
import shutil
import stat
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agents import pki
from agents.errors import PkiRefused
from agents.pki import Role, describe, identity_problems, identity_uri, init_ca, issue


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    init_ca(tmp_path / "pki", "test fleet")
    return tmp_path / "pki"


def problems_of(folder: Path, files: pki.IssuedFiles, **changes: object) -> list[str]:
    arguments: dict[str, object] = {
        "certificate": files.certificate,
        "key": files.key,
        "ca": folder / "ca.crt",
        "role": Role.AGENT,
        "name": "host-a",
    }
    return identity_problems(**(arguments | changes))  # type: ignore[arg-type]


def test_an_issued_certificate_proves_its_identity(folder: Path) -> None:
    assert problems_of(folder, issue(folder, Role.AGENT, "host-a")) == []


def test_an_agents_certificate_serves_and_asks_and_carries_addresses(folder: Path) -> None:
    files = issue(folder, Role.AGENT, "host-a", addresses=["host-a.example", "192.0.2.7", "2001:db8::1"])
    facts = describe(files.certificate)
    assert (facts.role, facts.name, facts.is_ca) == (Role.AGENT, "host-a", False)
    assert facts.uris == ("vmferry://agent/host-a",)
    assert facts.addresses == ("host-a.example", "192.0.2.7", "2001:db8::1")
    assert facts.days_left in (364, 365)
    certificate = x509.load_pem_x509_certificate(files.certificate.read_bytes())
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert set(usage) == {ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH}


def test_an_operators_certificate_cannot_serve(folder: Path) -> None:
    files = issue(folder, Role.OPERATOR, "eva")
    certificate = x509.load_pem_x509_certificate(files.certificate.read_bytes())
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.CLIENT_AUTH]


def test_a_ca_signs_and_does_nothing_else(folder: Path) -> None:
    certificate = x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes())
    constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    usage = certificate.extensions.get_extension_for_class(x509.KeyUsage)
    assert constraints.critical
    assert (constraints.value.ca, constraints.value.path_length) == (True, 0)
    assert usage.critical
    assert (usage.value.key_cert_sign, usage.value.digital_signature) == (True, False)


def test_serial_numbers_do_not_repeat(folder: Path) -> None:
    serials = {describe(issue(folder, Role.AGENT, f"host-{n}").certificate).serial for n in range(5)}
    assert len(serials) == 5


def test_keys_are_for_their_owner_alone_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        files = init_ca(tmp_path / "pki", "test")
    finally:
        os.umask(before)
    assert stat.S_IMODE(files.key.stat().st_mode) == 0o600
    assert stat.S_IMODE(files.key.parent.stat().st_mode) == 0o700


def test_nothing_is_overwritten_without_force(folder: Path) -> None:
    files = issue(folder, Role.AGENT, "host-a")
    before = files.certificate.read_bytes(), files.key.read_bytes()
    with pytest.raises(PkiRefused, match="exists"):
        issue(folder, Role.AGENT, "host-a")
    assert (files.certificate.read_bytes(), files.key.read_bytes()) == before
    issue(folder, Role.AGENT, "host-a", force=True)
    assert files.key.read_bytes() != before[1]
    assert problems_of(folder, files) == []


def test_a_key_alone_is_not_overwritten_either(folder: Path) -> None:
    files = issue(folder, Role.AGENT, "host-a")
    files.certificate.unlink()
    with pytest.raises(PkiRefused, match=r"host-a\.key exists"):
        issue(folder, Role.AGENT, "host-a")
    assert not files.certificate.exists()


def test_no_temporary_file_stays(folder: Path) -> None:
    issue(folder, Role.AGENT, "host-a")
    with pytest.raises(PkiRefused):
        issue(folder, Role.AGENT, "host-a")
    assert sorted(path.name for path in folder.iterdir()) == [
        "agent-host-a.crt",
        "agent-host-a.key",
        "ca.crt",
        "ca.key",
    ]


def test_a_folder_that_is_a_file_is_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "pki").write_text("")
    with pytest.raises(PkiRefused, match="pki"):
        init_ca(tmp_path / "pki", "test")


@pytest.mark.parametrize("name", ["a", "host-a.example", "9", "a" * 63])
def test_names_are_one_short_word(name: str) -> None:
    assert identity_uri(Role.AGENT, name) == f"vmferry://agent/{name}"


@pytest.mark.parametrize("name", ["", "a" * 64, "Host", "-a", ".a", "a/b", "../a", "a\n", "a b", "ä"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(PkiRefused, match="not a name"):
        identity_uri(Role.AGENT, name)


@pytest.mark.parametrize("address", ["", "a b", "-x", "a..b", "x" * 254, "host\n", "http://x"])
def test_bad_addresses_are_refused(folder: Path, address: str) -> None:
    with pytest.raises(PkiRefused, match="neither a host name"):
        issue(folder, Role.AGENT, "host-a", addresses=[address])
    assert not (folder / "agent-host-a.key").exists()


@pytest.mark.parametrize("days", [0, -1, pki.MAX_DAYS + 1])
def test_days_outside_the_limits_are_refused(folder: Path, days: int) -> None:
    with pytest.raises(PkiRefused, match="days"):
        issue(folder, Role.AGENT, "host-a", days=days)


def test_no_certificate_outlives_its_ca(tmp_path: Path) -> None:
    ca = init_ca(tmp_path, "short", days=10)
    files = issue(tmp_path, Role.AGENT, "host-a", days=365)
    assert describe(files.certificate).not_after == describe(ca.certificate).not_after


def test_a_missing_ca_is_said_with_its_remedy(tmp_path: Path) -> None:
    with pytest.raises(PkiRefused, match="vmferry pki init"):
        issue(tmp_path, Role.AGENT, "host-a")


def test_a_ca_whose_key_is_anothers_is_refused(folder: Path, tmp_path: Path) -> None:
    other = init_ca(tmp_path / "other", "other")
    shutil.copy(other.key, folder / "ca.key")
    with pytest.raises(PkiRefused, match="is not the key of"):
        issue(folder, Role.AGENT, "host-a")


def test_every_problem_of_an_identity_is_said_at_once(folder: Path, tmp_path: Path) -> None:
    init_ca(tmp_path / "other", "other")
    files = issue(folder, Role.AGENT, "host-b")
    files.key.chmod(0o640)
    problems = problems_of(
        folder, files, ca=tmp_path / "other" / "ca.crt", now=datetime.now(UTC) + timedelta(days=400)
    )
    assert len(problems) == 4
    text = " | ".join(problems)
    for words in ("agent/host-b", "expired on", "mode 0640", "not issued by the CA"):
        assert words in text


def test_a_certificate_of_another_role_is_said(folder: Path) -> None:
    files = issue(folder, Role.OPERATOR, "host-a")
    assert "is for an operator, and an agent is needed" in problems_of(folder, files)[0]


def test_any_name_does_when_none_is_asked(folder: Path) -> None:
    files = issue(folder, Role.OPERATOR, "eva")
    assert problems_of(folder, files, role=Role.OPERATOR, name=None) == []


def test_a_certificate_of_the_future_points_at_the_clock(folder: Path) -> None:
    files = issue(folder, Role.AGENT, "host-a")
    problems = problems_of(folder, files, now=datetime.now(UTC) - timedelta(days=1))
    assert ["clock" in problem for problem in problems] == [True]


def test_a_key_of_another_certificate_is_said(folder: Path) -> None:
    files = issue(folder, Role.AGENT, "host-a")
    other = issue(folder, Role.AGENT, "host-b")
    assert problems_of(folder, files, key=other.key) == [f"{other.key} is not the key of the certificate"]


def test_files_that_are_missing_are_each_said(folder: Path, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    files = pki.IssuedFiles(certificate=gone, key=gone)
    assert [str(gone) in problem for problem in problems_of(folder, files)] == [True, True]


def test_an_encrypted_key_is_said_so(folder: Path) -> None:
    files = issue(folder, Role.AGENT, "host-a")
    key = ec.generate_private_key(ec.SECP256R1())
    encryption = serialization.BestAvailableEncryption(b"secret")
    files.key.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
    )
    assert "encrypted" in problems_of(folder, files)[0]


def test_two_identities_in_one_certificate_are_none(tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.now(UTC)
    uris = [x509.UniformResourceIdentifier(f"vmferry://agent/host-{n}") for n in "ab"]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(x509.Name([]))
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now)
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(uris), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path / "two.crt"
    path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    facts = describe(path)
    assert (facts.role, facts.name, len(facts.uris)) == (None, None, 2)


def test_an_rsa_key_is_refused_in_words(folder: Path) -> None:
    files = issue(folder, Role.AGENT, "host-a")
    key = rsa.generate_private_key(public_exponent=65537, key_size=1024)
    files.key.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    assert "elliptic-curve" in problems_of(folder, files)[0]


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200), st.integers(0, 400), st.booleans())
def test_garbage_raises_only_pki_refused(folder: Path, garbage: bytes, at: int, whole: bool) -> None:
    good = (folder / "ca.crt").read_bytes()
    path = folder / "garbage.crt"
    path.write_bytes(garbage if whole else good[:at] + garbage + good[at + len(garbage) :])
    try:
        describe(path)
    except PkiRefused:
        return


def test_a_file_larger_than_the_limit_is_not_parsed(tmp_path: Path) -> None:
    path = tmp_path / "large.crt"
    path.write_bytes(b"x" * (pki.MAX_PEM_BYTES + 1))
    with pytest.raises(PkiRefused, match="larger"):
        describe(path)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command as a second opinion")
@pytest.mark.parametrize("purpose", ["sslserver", "sslclient"])
def test_openssl_agrees_that_the_chain_is_good(folder: Path, purpose: str) -> None:
    files = issue(folder, Role.AGENT, "host-a")
    command = ["openssl", "verify", "-x509_strict", "-purpose", purpose, "-CAfile", str(folder / "ca.crt")]
    outcome = subprocess.run([*command, str(files.certificate)], capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr
