from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from agents.cli.main import main
from agents.cli.output import Exit
from agents.hypervisors.embedded.client import GuestClient
from agents.hypervisors.embedded.rundir import GuestPaths, guest_ids


@pytest.fixture
def guests_dir(tmp_path: Path) -> Iterator[Path]:
    """A directory whose guests end with the test."""
    folder = tmp_path / "g"
    yield folder
    for guest_id in guest_ids(folder):
        with contextlib.closing(GuestClient(GuestPaths.of_guest(folder, guest_id).socket)) as client:
            client.quit()
            client.await_end()


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    path = tmp_path / "web1.toml"
    path.write_text('ram = "1MiB"\npattern = "idle"\n')
    return path


@pytest.mark.slow
def test_a_guest_is_started_listed_read_and_stopped(
    spec: Path, guests_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--dir", str(guests_dir)]
    assert main(["guest", "start", str(spec), *where, "--json"]) == Exit.OK
    started = json.loads(capsys.readouterr().out)
    assert started["name"] == "web1"

    assert main(["guest", "ps", *where]) == Exit.OK
    heading, row = capsys.readouterr().out.splitlines()
    assert heading.split()[0] == "GUEST"
    assert row.split()[:4] == ["web1", "running", "1.00", "MiB"]
    assert row.split()[-2:] == [str(started["pid"]), started["guest_id"]]
    assert main(["guest", "ps", *where, "--json"]) == Exit.OK
    assert [one["errors"] for one in json.loads(capsys.readouterr().out)] == [0]

    assert main(["guest", "console", "web1", *where, "--json"]) == Exit.OK
    assert json.loads(capsys.readouterr().out)["guest_id"] == started["guest_id"]
    assert main(["guest", "console", "web1", *where]) == Exit.OK
    capsys.readouterr()

    assert main(["guest", "stop", started["guest_id"], *where]) == Exit.OK
    assert capsys.readouterr().out == "web1 has ended\n"
    assert list(guest_ids(guests_dir)) == []


@pytest.mark.slow
def test_of_two_guests_of_one_name_neither_is_stopped(
    spec: Path, guests_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--dir", str(guests_dir)]
    for _ in range(2):
        assert main(["guest", "start", str(spec), *where]) == Exit.OK
    assert main(["guest", "stop", "web1", *where]) == Exit.REFUSED
    assert "'web1' is not one guest; name it by its identity" in capsys.readouterr().err
    assert len(list(guest_ids(guests_dir))) == 2


@pytest.mark.parametrize("verb", ["stop", "console"])
def test_a_guest_that_is_not_there_is_an_error_in_words(
    verb: str, guests_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["guest", verb, "web1", "--dir", str(guests_dir)]) == Exit.REFUSED
    assert capsys.readouterr().err.startswith("error: no guest 'web1'")


def test_an_empty_directory_has_no_guests(guests_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["guest", "ps", "--dir", str(guests_dir)]) == Exit.OK
    assert capsys.readouterr().err == f"no guests in {guests_dir}\n"


def test_a_wrong_description_is_refused_with_its_mistakes(
    tmp_path: Path, guests_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = tmp_path / "wrong.toml"
    wrong.write_text('ram = "1"\ncpus = 3\n')
    assert main(["guest", "start", str(wrong), "--dir", str(guests_dir)]) == Exit.REFUSED
    shown = capsys.readouterr().err
    assert "cpus: unknown key" in shown
    assert "ram: 1 is not" in shown
    assert not guests_dir.exists()
