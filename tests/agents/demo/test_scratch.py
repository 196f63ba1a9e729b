from __future__ import annotations

import stat
from pathlib import Path

import anyio
import pytest
from anyio.abc import SocketAttribute

from agents.config import EventLoop, load_settings
from agents.demo import scratch as scratch_module
from agents.demo.errors import AgentDidNotStart
from agents.demo.scratch import DESTINATION, HOSTS, SOURCE, Scratch, open_scratch, running_agents

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def temporary(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("s")
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def test_the_directory_is_for_its_owner_alone_and_goes_in_the_end(temporary: Path) -> None:
    with open_scratch(keep=False) as scratch:
        assert stat.S_IMODE(scratch.folder.stat().st_mode) == 0o700
        assert scratch.shared.is_dir()
    assert list(temporary.iterdir()) == []


def test_the_directory_stays_where_it_is_asked_for_or_an_error_leaves() -> None:
    with open_scratch(keep=True) as kept:
        pass
    assert kept.folder.is_dir()
    with pytest.raises(OSError, match="cause"), open_scratch(keep=False) as failed:
        raise OSError("cause")
    assert failed.folder.is_dir()


def test_an_interrupted_demo_keeps_nothing(temporary: Path) -> None:
    with pytest.raises(KeyboardInterrupt), open_scratch(keep=False):
        raise KeyboardInterrupt
    assert list(temporary.iterdir()) == []


def test_last_words_are_the_last_line_that_says_something(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path)
    assert scratch.last_words(SOURCE) == ""
    scratch.log(SOURCE).write_text("first\nlast\n\n  \n")
    assert scratch.last_words(SOURCE) == "last"
    scratch.log(SOURCE).write_text("x" * 5000)
    assert scratch.last_words(SOURCE) == "x" * 2048
    assert scratch.logs == (scratch.log(SOURCE),)


@pytest.mark.slow
@pytest.mark.parametrize("with_cutter", [False, True])
async def test_both_agents_serve_and_know_each_other(with_cutter: bool) -> None:
    with open_scratch(keep=False) as scratch:
        async with running_agents(scratch, event_loop=EventLoop.ASYNCIO, with_cutter=with_cutter) as agents:
            assert set(agents.settings.hosts) == set(HOSTS)
            settings = load_settings(scratch.config(SOURCE))
            peer = settings.peers[DESTINATION]
            own = agents.settings.hosts[DESTINATION]
            assert (agents.cutter is not None) is with_cutter
            assert (peer.host != own.host) is with_cutter
            assert peer.port == own.port


@pytest.mark.slow
async def test_a_port_that_was_taken_meanwhile_is_chosen_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    choose, tries = scratch_module._free_ports, 0
    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener:
        taken = int(listener.extra(SocketAttribute.local_port))

        async def first_a_taken_one(count: int) -> list[int]:
            nonlocal tries
            tries += 1
            ports = await choose(count)
            return [taken, *ports[1:]] if tries == 1 else ports

        monkeypatch.setattr(scratch_module, "_free_ports", first_a_taken_one)
        with open_scratch(keep=False) as scratch:
            async with running_agents(scratch, event_loop=EventLoop.ASYNCIO, with_cutter=False):
                assert tries == 2


@pytest.mark.slow
async def test_an_agent_that_cannot_start_is_named_with_its_last_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scratch_module, "_config", lambda *arguments: "[agent]\n")
    with open_scratch(keep=False) as scratch, pytest.raises(AgentDidNotStart) as refused:
        async with running_agents(scratch, event_loop=EventLoop.ASYNCIO, with_cutter=False):
            pass
    assert refused.value.host == SOURCE
    assert "the agent of host-a did not start: " in str(refused.value)
    assert refused.value.last_words
