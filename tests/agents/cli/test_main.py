from __future__ import annotations

import subprocess
import sys
from types import MappingProxyType

import click
import pytest

from agents.cli import main as cli_main
from agents.cli.main import COMMANDS, cli, main
from agents.cli.output import Exit
from agents.version import VERSION
from migrate.errors import InDoubt


def test_help_lists_every_command_and_every_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for name, lazy in COMMANDS.items():
        assert f"{name} " in shown
        assert lazy.summary[:30] in shown
    for code in Exit:
        assert f"\n    {int(code):<3}  " in shown


@pytest.mark.slow
def test_help_imports_no_command_and_nothing_heavy() -> None:
    heavy = ["anyio", "trio", "asyncio", "cryptography", "numpy", "rich", "prometheus_client", "unicorn"]
    script = (
        "import sys; from agents.cli.main import main; main(['--help'])\n"
        f"print([name for name in {heavy} if name in sys.modules], file=sys.stderr)"
    )
    outcome = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert outcome.stderr.strip() == "[]"


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_each_command_loads_and_its_help_has_examples(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert "Examples:" in shown
    assert f"  vmferry {name}" in shown


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_the_list_says_the_same_as_the_command(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    assert command.get_short_help_str(limit=200) == COMMANDS[name].summary


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"vmferry {VERSION}\n"


def test_a_mistyped_command_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pkii"]) == Exit.USAGE
    assert capsys.readouterr().err == "error: no command 'pkii'; did you mean 'pki'?\nTry `vmferry --help`.\n"


def test_an_option_nobody_knows_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pki", "init", "--bogus"]) == Exit.USAGE
    assert "Try `vmferry pki init --help`." in capsys.readouterr().err


def call(monkeypatch: pytest.MonkeyPatch, outcome: object) -> int:
    """Run a command that returns `outcome`, or raises it."""

    @click.command
    def probe() -> object:
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    monkeypatch.setattr(sys.modules[__name__], "probe", probe, raising=False)
    lazy = cli_main.LazyCommand(f"{__name__}:probe", "", "")
    monkeypatch.setattr(cli, "_lazy", MappingProxyType({"probe": lazy}))
    monkeypatch.setitem(sys.modules, __name__, sys.modules[__name__])
    return main(["probe"])


@pytest.mark.parametrize(("outcome", "code"), [(None, 0), (0, 0), (4, 4)])
def test_a_commands_value_is_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, outcome: object, code: int
) -> None:
    assert call(monkeypatch, outcome) == code


def test_a_known_error_is_printed_and_becomes_its_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, InDoubt("nobody knows yet")) == Exit.IN_DOUBT
    assert capsys.readouterr().err == "error: nobody knows yet\n"


@pytest.mark.parametrize("outcome", [KeyboardInterrupt(), BaseExceptionGroup("tasks", [KeyboardInterrupt()])])
def test_ctrl_c_is_no_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], outcome: BaseException
) -> None:
    assert call(monkeypatch, outcome) == Exit.INTERRUPTED
    assert "error" not in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ZeroDivisionError):
        call(monkeypatch, ZeroDivisionError())


def test_names_are_completed_from_the_table() -> None:
    items = cli.shell_complete(click.Context(cli), "comp")
    assert [item.value for item in items] == ["completion"]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_a_shell_gets_its_completion_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    assert "_VMFERRY_COMPLETE" in capsys.readouterr().out
