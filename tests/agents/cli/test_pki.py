from __future__ import annotations

import json
from pathlib import Path

import pytest

from agents.cli.main import main
from agents.cli.output import Exit


@pytest.fixture
def folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["pki", "init", "--dir", str(tmp_path / "pki")]) == 0
    capsys.readouterr()
    return str(tmp_path / "pki")


def test_what_is_issued_can_be_shown(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pki", "issue", "agent", "host-a", "--dir", folder, "--address", "192.0.2.7", "--json"]) == 0
    issued = json.loads(capsys.readouterr().out)
    assert issued["facts"]["role"] == "agent"
    assert main(["pki", "show", issued["files"]["certificate"]]) == 0
    shown = capsys.readouterr().out
    assert "identity     agent host-a\n" in shown
    assert "addresses    192.0.2.7\n" in shown
    assert main(["pki", "show", issued["files"]["certificate"], "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == issued["facts"]


def test_a_ca_is_shown_as_one(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pki", "show", f"{folder}/ca.crt"]) == 0
    assert "a certificate authority" in capsys.readouterr().out


def test_a_second_ca_is_refused_without_force(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pki", "init", "--dir", folder]) == Exit.REFUSED
    assert capsys.readouterr().err.endswith("ca.crt exists; it is replaced only with --force\n")
    assert main(["pki", "init", "--dir", folder, "--force"]) == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["pki", "issue", "king", "host-a"],
        ["pki", "issue", "agent"],
        ["pki", "init", "--days", "0"],
        ["pki", "show"],
    ],
)
def test_wrong_usage_writes_nothing(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == Exit.USAGE
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_certificate_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.crt"
    path.write_text("hello")
    assert main(["pki", "show", str(path)]) == Exit.REFUSED
    assert capsys.readouterr().err == f"error: {path} holds no PEM certificate that can be read\n"


def test_who_is_revoked_is_listed(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pki", "issue", "operator", "eva", "--dir", folder, "--json"]) == 0
    serial = json.loads(capsys.readouterr().out)["facts"]["serial"]
    assert main(["pki", "revoke", "operator/eva", "--serial", "7", "--dir", folder, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["serials"] == sorted([serial, "7"])
    assert made["list"] == f"{folder}/ca.crl"
    assert main(["pki", "revoke", "--dir", folder]) == 0
    assert "revoked      2\n" in capsys.readouterr().out
    assert main(["pki", "revoke", "eva", "--dir", folder]) == Exit.REFUSED
    assert "'eva' is no identity: say agent/HOST or operator/NAME" in capsys.readouterr().err
