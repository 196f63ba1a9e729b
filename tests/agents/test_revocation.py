from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from agents import pki
from agents.errors import PkiRefused
from agents.revocation import read_list, revoke


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pki.init_ca(tmp_path / "pki", "test fleet")
    return tmp_path / "pki"


def listed(folder: Path) -> frozenset[str]:
    return read_list(folder / "ca.crl", folder / "ca.crt").serials


def test_who_is_revoked_stays_so(folder: Path) -> None:
    first = pki.describe(pki.issue(folder, pki.Role.AGENT, "host-a").certificate).serial
    second = pki.describe(pki.issue(folder, pki.Role.OPERATOR, "eva").certificate).serial
    revoke(folder, ["agent/host-a"])
    assert listed(folder) == {first}
    revoke(folder, ["operator/eva", "agent/host-a"], ["0AbC"])
    revoke(folder, ())
    assert listed(folder) == {first, second, "abc"}


def test_a_new_certificate_of_a_revoked_name_is_good(folder: Path) -> None:
    pki.issue(folder, pki.Role.AGENT, "host-a")
    revoke(folder, ["agent/host-a"])
    again = pki.issue(folder, pki.Role.AGENT, "host-a", force=True)
    assert pki.describe(again.certificate).serial not in listed(folder)


def test_openssl_agrees(folder: Path) -> None:
    files = pki.issue(folder, pki.Role.AGENT, "host-a")
    good = pki.issue(folder, pki.Role.AGENT, "host-b")
    revoke(folder, ["agent/host-a"])
    command = [
        "openssl",
        "verify",
        "-crl_check",
        "-CAfile",
        f"{folder}/ca.crt",
        "-CRLfile",
        f"{folder}/ca.crl",
    ]
    verdict = subprocess.run([*command, str(files.certificate)], capture_output=True, text=True, check=False)
    assert "certificate revoked" in verdict.stderr + verdict.stdout
    subprocess.run([*command, str(good.certificate)], capture_output=True, check=True)


@pytest.mark.parametrize("name", ["host-a", "agent/", "agent/../ca", "ca/x", "agent/host-b"])
def test_what_names_no_certificate_is_refused_and_writes_nothing(folder: Path, name: str) -> None:
    with pytest.raises(PkiRefused):
        revoke(folder, [name])
    assert not (folder / "ca.crl").exists()


@pytest.mark.parametrize("serial", ["", "0", "xyz", "-1", "f" * 41])
def test_what_is_no_serial_number_is_refused(folder: Path, serial: str) -> None:
    with pytest.raises(PkiRefused, match="no serial number"):
        revoke(folder, (), [serial])


def test_a_list_is_as_long_as_the_limit_and_no_longer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agents.revocation.MAX_REVOKED", 3)
    revoke(folder, (), ["1", "2", "3"])
    with pytest.raises(PkiRefused, match="more than 3"):
        revoke(folder, (), ["4"])
    assert listed(folder) == {"1", "2", "3"}


def test_a_list_of_another_ca_is_refused(folder: Path, tmp_path: Path) -> None:
    pki.init_ca(tmp_path / "other", "test fleet")
    revoke(tmp_path / "other", ())
    with pytest.raises(PkiRefused, match="has no list that CN=test fleet has signed"):
        read_list(tmp_path / "other" / "ca.crl", folder / "ca.crt")


def test_a_file_with_a_certificate_in_it_is_no_list(folder: Path) -> None:
    revoke(folder, ())
    both = folder / "both.crl"
    both.write_bytes((folder / "ca.crl").read_bytes() + (folder / "ca.crt").read_bytes())
    with pytest.raises(PkiRefused, match="nothing else"):
        read_list(both, folder / "ca.crt")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
@given(garbage=st.binary(max_size=60), at=st.integers(0, 300))
# A name whose tag is another one: it is read only when it is asked for.
@example(garbage=b"AAS", at=64)
def test_garbage_raises_only_pki_refused(folder: Path, garbage: bytes, at: int) -> None:
    revoke(folder, ())
    path = folder / "ca.crl"
    content = path.read_bytes()
    path.write_bytes(content[:at] + garbage + content[at + len(garbage) :])
    try:
        read_list(path, folder / "ca.crt")
    except PkiRefused:
        pass
    finally:
        path.unlink()
