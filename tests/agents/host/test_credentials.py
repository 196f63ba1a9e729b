"""Certificates that are replaced or revoked while two agents run; real files, real connections."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import anyio
import pytest

from agents import pki
from agents.api import GetHost, HostView
from agents.config import TlsSettings
from agents.errors import PkiRefused
from agents.host import credentials as credentials_module
from agents.host.agent import _end_on_signals
from agents.host.credentials import Credentials
from agents.metrics import AgentMetrics
from agents.revocation import read_list, revoke
from migrate.phases import Phase
from tests.agents.host.fleet import NOISE, SLOW, Fleet, in_precopy, report_of, running_fleet
from tests.waiting import until
from transport.errors import PeerGone, UntrustedPeer

pytestmark = pytest.mark.anyio


@pytest.fixture
def files(tmp_path: Path) -> TlsSettings:
    """An agent's files, with a list that revokes nobody."""
    folder = tmp_path / "pki"
    pki.init_ca(folder, "test")
    issued = pki.issue(folder, pki.Role.AGENT, "host-a")
    revoke(folder, ())
    return TlsSettings(
        ca=folder / "ca.crt", certificate=issued.certificate, key=issued.key, crl=folder / "ca.crl"
    )


def made(files: TlsSettings) -> tuple[Credentials, AgentMetrics]:
    metrics = AgentMetrics("host-a", "0")
    return Credentials(files, "host-a", metrics), metrics


def test_the_ends_of_all_files_are_told(files: TlsSettings) -> None:
    ends = made(files)[0].ends
    assert ends.own_ends_at_s == pki.describe(files.certificate).not_after.timestamp()
    assert ends.crl_ends_at_s == ends.ca_ends_at_s > ends.own_ends_at_s
    assert made(replace(files, crl=None))[0].ends == replace(ends, crl_ends_at_s=None)


async def changed_once(credentials: Credentials, change: Callable[[], object]) -> bool:
    """Change files under a watch that is asked to look; tell whether it took them."""
    took = anyio.Event()

    async def on_change() -> None:
        took.set()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(credentials.watch, on_change)
        change()
        credentials.ask_to_look()
        with anyio.move_on_after(0.15):
            await took.wait()
        tasks.cancel_scope.cancel()
    return took.is_set()


async def test_new_files_are_used_and_shown(files: TlsSettings) -> None:
    credentials, metrics = made(files)
    before = credentials.server()
    folder = files.ca.parent
    assert await changed_once(
        credentials, lambda: pki.issue(folder, pki.Role.AGENT, "host-a", 100, force=True)
    )
    assert credentials.server() is not before
    ends = pki.describe(files.certificate).not_after.timestamp()
    shown = {
        which: metrics.registry.get_sample_value(
            "vmferry_certificate_expiry_timestamp_seconds", {"certificate": which}
        )
        for which in ("own", "ca", "crl")
    }
    assert shown["own"] == ends
    assert shown["ca"] == shown["crl"] == pki.describe(files.ca).not_after.timestamp()


@pytest.mark.parametrize("broken", ["certificate", "key", "ca", "crl"])
async def test_broken_files_are_said_and_the_old_ones_go_on(
    files: TlsSettings, broken: str, caplog: pytest.LogCaptureFixture
) -> None:
    credentials, _ = made(files)
    before = credentials.server(), credentials.client()
    path: Path = getattr(files, broken)
    assert not await changed_once(credentials, lambda: path.write_text("half a fi"))
    assert (credentials.server(), credentials.client()) == before
    assert "new certificates not used" in caplog.text


async def test_a_certificate_of_another_host_is_not_taken(files: TlsSettings) -> None:
    credentials, _ = made(files)
    other = pki.issue(files.ca.parent, pki.Role.AGENT, "host-b")

    def replace() -> None:
        shutil.copy(other.certificate, files.certificate)
        shutil.copy(other.key, files.key)

    assert not await changed_once(credentials, replace)


@pytest.mark.parametrize(("days", "is_said"), [(13, True), (15, False)])
async def test_an_end_in_less_than_two_weeks_is_said(
    files: TlsSettings, days: int, is_said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    pki.issue(files.ca.parent, pki.Role.AGENT, "host-a", days, force=True)
    made(files)
    assert ("ends soon" in caplog.text) is is_said


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
async def test_a_key_of_another_user_is_refused_with_its_remedy(files: TlsSettings) -> None:
    os.chown(files.key, 12345, -1)
    with pytest.raises(
        PkiRefused, match=r"agent-host-a.key belongs to user 12345 \(mode 0600\).*run chown 0 on it"
    ):
        made(files)


async def test_a_list_that_has_ended_is_refused(files: TlsSettings) -> None:
    assert files.crl is not None
    with pytest.raises(PkiRefused, match="ended on"):
        read_list(files.crl, files.ca, datetime.now(UTC) + timedelta(days=4000))


# ------------------------------------------------------------------ two agents


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credentials_module, "LOOK_EVERY_S", 0.05)


async def until_refused(fleet: Fleet, host: str) -> UntrustedPeer:

    async def refused() -> UntrustedPeer | None:
        try:
            await fleet.ask(host, GetHost())
        except UntrustedPeer as exc:
            return exc
        return None

    return await until(refused, f"a refusal by {host}")


@pytest.mark.slow
async def test_an_agent_gets_a_new_certificate_without_a_restart_and_keeps_its_connections(
    folder: Path, quick: None
) -> None:
    async with running_fleet(folder) as fleet, fleet.operator("host-a") as old:
        before = await fleet.serial("host-a")
        files = pki.issue(folder / "pki", pki.Role.AGENT, "host-a", force=True)
        wanted = pki.describe(files.certificate).serial
        assert wanted != before
        with anyio.fail_after(10):
            while await fleet.serial("host-a") != wanted:
                pass
        await old.send(GetHost())
        assert isinstance(await old.receive(), HostView)


@pytest.mark.slow
async def test_a_revoked_operator_is_cut_and_then_refused(folder: Path, quick: None) -> None:
    async with running_fleet(folder, crl=True) as fleet:
        async with fleet.operator("host-a") as channel:
            await channel.send(GetHost())
            assert isinstance(await channel.receive(), HostView)
            revoke(folder / "pki", ["operator/tester"])
            with anyio.fail_after(10), pytest.raises(PeerGone):
                await channel.receive()
        assert "revoked" in str(await until_refused(fleet, "host-a"))
        status, page = await fleet.page("host-a", "/metrics")
        assert status == 200
        assert 'vmferry_decisions_total{verdict="cut"} 1.0' in page
    lines = [
        json.loads(line) for line in (fleet.state_dir("host-a") / "audit.jsonl").read_text().splitlines()
    ]
    assert [(line["peer"], line["reason"]) for line in lines if line["verdict"] == "cut"] == [
        ("operator/tester", "the certificate of operator/tester was revoked")
    ]
    assert any(line["verdict"] == "refused" and "revoked" in line["reason"] for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("revoked", ["host-a", "host-b"])
async def test_a_move_from_or_to_a_revoked_host_ends_and_the_guest_runs_where_it_was(
    folder: Path, quick: None, revoked: str
) -> None:
    async with running_fleet(folder, crl=True) as fleet:
        guest = fleet.start_guest("host-a", **NOISE).guest_id
        job = await fleet.start("worker", "host-a", "host-b", bandwidth_bytes_per_s=SLOW)
        await fleet.until("host-a", job, in_precopy)
        revoke(folder / "pki", [f"agent/{revoked}"])
        # Whoever asks an agent that is revoked itself needs a list that does not say so: the test's operator has none.
        view = await fleet.follow("host-a", job)
        assert view.phase == Phase.ROLLED_BACK
        assert "revoked" in str(report_of(view).error)
        await fleet.check_runs_only_at("host-a", guest)


async def test_a_hangup_signal_reads_the_files_again_and_ends_nothing() -> None:
    told: list[str] = []
    heard = anyio.Event()

    class Told:
        def reload(self) -> None:
            told.append("reload")
            heard.set()

        def ask_to_end(self) -> None:
            told.append("end")

    async with anyio.create_task_group() as tasks:
        await tasks.start(_end_on_signals, Told())
        os.kill(os.getpid(), signal.SIGHUP)
        with anyio.fail_after(5):
            await heard.wait()
        tasks.cancel_scope.cancel()
    assert told == ["reload"]
