from __future__ import annotations

from pathlib import Path

import click
import pytest
from click.shell_completion import ShellComplete

from agents.cli.main import cli, main
from agents.cli.options import DURATION, HOST, RATE, call
from agents.cli.output import Exit


def completed(args: list[str], incomplete: str) -> list[str]:
    shell = ShellComplete(cli, {}, "vmferry", "_VMFERRY_COMPLETE")
    return [item.value for item in shell.get_completions(args, incomplete)]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A client's configuration whose certificates do not exist: completion must not look at them."""
    monkeypatch.setenv("VMFERRY_CONFIG", str(tmp_path / "none.toml"))
    path = tmp_path / "client.toml"
    path.write_text('[tls]\nca = "x"\n[hosts.host-a]\naddress = "a:1"\n[hosts.host-b]\naddress = "b:1"\n')
    return path


def test_hosts_are_completed_from_the_configuration(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMFERRY_CONFIG", str(config))
    assert completed(["move", "vm1", "--to"], "") == ["host-a", "host-b"]
    assert completed(["check", "vm1", "--to"], "host-b") == ["host-b"]


def test_hosts_are_completed_from_the_configuration_that_is_named(config: Path) -> None:
    assert completed(["move", "--config", str(config), "vm1", "--to"], "") == ["host-a", "host-b"]


@pytest.mark.parametrize("content", [None, "hosts = 3", "[[[", "\udcff"])
def test_completion_never_complains(config: Path, content: str | None) -> None:
    if content is None:
        config.unlink()
    else:
        config.write_bytes(content.encode(errors="surrogateescape"))
    assert completed(["move", "--config", str(config), "vm1", "--to"], "") == []


def test_quantities_are_read_once_and_refused_in_words() -> None:
    assert DURATION.convert("300ms", None, None) == 0.3
    assert RATE.convert("1Gbit/s", None, None) == 125_000_000
    assert RATE.convert(5, None, None) == 5
    with pytest.raises(click.BadParameter, match="write 5ms or 5s"):
        DURATION.convert("5", None, None)


def test_any_name_passes_for_a_host() -> None:
    assert HOST.convert("host-x", None, None) == "host-x"


def test_a_missing_configuration_is_one_message_and_exit_code_2(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["hosts", "--config", str(config.with_name("none.toml"))]) == Exit.USAGE
    assert capsys.readouterr().err.startswith("error: ")


def test_a_coroutine_is_run_to_its_value() -> None:
    async def three() -> int:
        return 3

    assert call(three) == 3
