from __future__ import annotations

import math
from dataclasses import replace

import anyio
import pytest

from migrate.facts import PathFacts
from migrate.messages import Commit, Load
from migrate.preflight import AREAS, Finding, Inspection, Severity, Unanswered, examine, examine_alone
from migrate.preflight.network import SWITCHOVER_ROUND_TRIPS, WARN_MTU_BYTES, WARN_ROUND_TRIP_S
from tests.migrate.test_preflight import GOOD
from tests.migrate.world import CAPACITY, FACTS, InMemorySender, World

GOOD_PATH = GOOD.path
NETWORK = ("reachable", "round-trip", "mtu", "throughput")


def path_of(**changed: object) -> PathFacts:
    assert GOOD_PATH is not None
    return replace(GOOD_PATH, **changed)  # type: ignore[arg-type]


def findings(inspection: Inspection) -> dict[str, Finding]:
    return {one.check: one for one in examine(inspection).findings if one.check in NETWORK}


def judged(**changed: object) -> dict[str, Finding]:
    return findings(replace(GOOD, path=path_of(**changed)))


def test_a_move_looks_at_no_path_and_is_not_refused_for_it() -> None:
    found = findings(replace(GOOD, path=None))
    assert {one.severity for one in found.values()} == {Severity.UNKNOWN}
    assert tuple(found) == NETWORK
    assert all(one.remedy == "" for one in found.values())


def test_a_data_port_that_cannot_be_reached_is_refused_with_the_port_and_both_hosts() -> None:
    found = judged(
        data_error="the connection is refused", goodput_bytes_per_s=None, unmeasured="no connection"
    )
    reachable = found["reachable"]
    assert reachable.severity is Severity.REFUSED
    for words in ("7701", "host-a", "host-b", "the connection is refused"):
        assert words in reachable.found
    assert "7701" in reachable.remedy
    assert found["throughput"].severity is Severity.UNKNOWN
    assert "no connection" in found["throughput"].found


def test_a_destination_that_is_not_reached_leaves_every_check_with_a_finding() -> None:
    blocked = replace(FACTS, blockers=("VFIO", "a job"))
    report = examine_alone(
        Unanswered(
            guest=blocked,
            source_host="host-a",
            host="host-b",
            here=GOOD.here,
            reason="no answer",
            is_denied=False,
        )
    )
    assert {one.check for one in report.findings} == {
        check.check_id for area in AREAS for check in area.CHECKS
    }
    refused = report.of(Severity.REFUSED)
    assert [one.check for one in refused] == ["guest-blocked", "guest-blocked", "reachable"]
    assert "VFIO" in refused[0].found
    assert "a job" in refused[1].found
    assert "no answer" in refused[2].found
    assert not report.is_passed


def test_a_destination_that_names_no_port_is_refused() -> None:
    reachable = judged(data_port=0, data_error="host-b is being shut down")["reachable"]
    assert reachable.severity is Severity.REFUSED
    assert "host-b is being shut down" in reachable.found


def test_a_destination_that_ends_is_not_called_unreachable_besides() -> None:
    capacity = replace(CAPACITY, moves=replace(CAPACITY.moves, is_draining=True))
    path = path_of(data_port=0, data_error="host-b is being shut down")
    report = examine(replace(GOOD, path=path, there=replace(GOOD.there, capacity=capacity)))
    assert [one.check for one in report.of(Severity.REFUSED)] == ["draining"]
    assert "reachable" in {one.check for one in report.of(Severity.UNKNOWN)}


def test_the_round_trip_warns_above_its_limit_and_tells_what_it_costs() -> None:
    assert judged(ping_s=WARN_ROUND_TRIP_S)["round-trip"].severity is Severity.OK
    warned = judged(ping_s=0.06)["round-trip"]
    assert warned.severity is Severity.WARNING
    assert "2 of them are 120.0 ms of downtime" in warned.found
    # Without an answer of the agents the kernel's figure stands in.
    assert judged(ping_s=None, rtt_s=0.06)["round-trip"].severity is Severity.WARNING
    assert judged(ping_s=None, rtt_s=None)["round-trip"].severity is Severity.UNKNOWN


def test_a_small_mtu_warns_whichever_end_has_it() -> None:
    assert judged(mtu_bytes=WARN_MTU_BYTES)["mtu"].severity is Severity.OK
    assert judged(mtu_bytes=WARN_MTU_BYTES - 1)["mtu"].severity is Severity.WARNING
    # This end's device has 1500, the other end takes segments for 1300 only.
    assert judged(mtu_bytes=1500, mss_bytes=1248)["mtu"].severity is Severity.WARNING
    assert judged(mtu_bytes=None, mss_bytes=1448)["mtu"].severity is Severity.OK
    assert judged(mtu_bytes=None, mss_bytes=None)["mtu"].severity is Severity.UNKNOWN


def test_a_path_that_lets_only_greetings_through_is_said_to_drop_large_packets() -> None:
    found = judged(goodput_bytes_per_s=0.0, retransmits=6)
    assert found["mtu"].severity is Severity.WARNING
    assert "drop large packets" in found["mtu"].found
    assert found["throughput"].severity is Severity.REFUSED


@pytest.mark.parametrize("goodput", [0.0, -1.0, math.nan, math.inf])
def test_only_a_path_that_carries_nothing_is_refused(goodput: float) -> None:
    refused = judged(goodput_bytes_per_s=goodput, unmeasured="it broke")["throughput"]
    assert refused.severity is Severity.REFUSED
    assert "it broke" in refused.found
    assert judged(goodput_bytes_per_s=1e-3)["throughput"].severity is Severity.OK


def test_a_path_that_is_too_slow_for_the_time_limit_warns() -> None:
    slow = replace(GOOD, path=path_of(goodput_bytes_per_s=FACTS.ram_bytes / 10))
    assert findings(slow)["throughput"].severity is Severity.OK
    assert findings(replace(slow, time_limit_s=10.0))["throughput"].severity is Severity.OK
    warned = findings(replace(slow, time_limit_s=9.9))["throughput"]
    assert warned.severity is Severity.WARNING
    assert "9.9 s" in warned.found


def test_what_was_not_measured_is_unknown_and_says_why() -> None:
    found = judged(goodput_bytes_per_s=None, unmeasured="host-b measures the path from host-c just now")
    assert found["throughput"].severity is Severity.UNKNOWN
    assert "host-c" in found["throughput"].found
    assert {one.severity for check, one in found.items() if check != "throughput"} == {Severity.OK}


def test_a_cap_stands_in_the_sentence() -> None:
    assert "capped at 10 MB/s" in judged(cap_bytes_per_s=10_000_000)["throughput"].found


@pytest.mark.anyio
async def test_the_source_waits_so_often_while_the_guest_stands_still(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World()
    guest, waited, under_way = world.guest, list[str](), list[str]()
    send_all, handle, answered = InMemorySender.send_all, world.incoming.handle, anyio.Event()

    async def counted_send(self: InMemorySender, *args: object, **options: object) -> None:
        if guest.is_running:
            await send_all(self, *args, **options)  # type: ignore[arg-type]
            return
        under_way.append("pages")
        await send_all(self, *args, **options)  # type: ignore[arg-type]
        # An acknowledgement is as long on its way as an answer.
        await answered.wait()
        under_way.clear()

    async def counted_handle(request: object) -> object:
        if not guest.is_running:
            # What travels beside something else is waited for once.
            waited.append(" and ".join((*under_way, type(request).__name__)))
            answered.set()
        return await handle(request)

    monkeypatch.setattr(InMemorySender, "send_all", counted_send)
    monkeypatch.setattr(world.incoming, "handle", counted_handle)
    await world.migrate()
    assert waited == [f"pages and {Load.__name__}", Commit.__name__]
    assert len(waited) == SWITCHOVER_ROUND_TRIPS
