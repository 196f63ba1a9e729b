"""The path between the hosts, as the source has found it: ports, round trip, MTU, and what it carries."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

from migrate.facts import PathFacts
from migrate.preflight.evidence import Inspection, Unanswered
from migrate.preflight.report import Check, Finding

__all__ = [
    "CHECKS",
    "MTU",
    "REACHABLE",
    "ROUND_TRIP",
    "SWITCHOVER_ROUND_TRIPS",
    "THROUGHPUT",
    "WARN_MTU_BYTES",
    "WARN_ROUND_TRIP_S",
    "judge",
    "judge_alone",
]

REACHABLE: Final = Check(
    check_id="reachable",
    asked="Can the source reach the destination's control port and its data port?",
    why="Agents talk on one port, and pages travel on connections of their own to another one",
    remedy="Let TCP through from the source to the destination's listen and data_listen ([agent]); give data_listen a "
    "fixed port, and an address that the source has a route to",
)
ROUND_TRIP: Final = Check(
    check_id="round-trip",
    asked="Is the round trip between the hosts short?",
    why="While the guest stands still the source waits twice: for its last pages and Load together, and for Commit",
    remedy="Use a shorter way between the hosts, or allow a longer downtime (--downtime-limit)",
)
MTU: Final = Check(
    check_id="mtu",
    asked="Do packets of a usual size pass between the hosts?",
    why="Small packets cost CPU at both ends; a device that drops large ones in silence lets only greetings pass",
    remedy="Set the same MTU on every device of the way, and let ICMP (fragmentation needed, packet too big) through",
)
THROUGHPUT: Final = Check(
    check_id="throughput",
    asked="Does the path carry the guest's RAM in time?",
    why="All of the RAM travels at least once, and what the guest writes meanwhile again",
    remedy="Use a faster network for the addresses of [peers.NAME], raise connections or bandwidth in [limits], or "
    "allow more time (--timeout)",
)
CHECKS: Final = (REACHABLE, ROUND_TRIP, MTU, THROUGHPUT)

# In `migrate.source`, from `_stop` to the answer to Commit: the last payloads and Load beside them, then Commit.
# The guest itself runs again half a round trip earlier, when Commit has arrived.
SWITCHOVER_ROUND_TRIPS: Final = 2
# Two of them make a third of the default downtime limit of 300 ms.
WARN_ROUND_TRIP_S: Final = 0.05
# Tunnels leave 1420 to 1450 of Ethernet's 1500; what has less is nested, or somewhere set wrong.
WARN_MTU_BYTES: Final = 1400
# Of a packet's MTU: headers of IPv6 and TCP with timestamps.
_HEADERS_BYTES: Final = 72


def judge(inspection: Inspection) -> Iterator[Finding]:
    """Judge the path. A move does not measure it: its own rounds do."""
    path = inspection.path
    if path is None:
        source, host = inspection.source_host, inspection.host.name
        yield REACHABLE.unknown(
            f"{host}'s control port answers {source}; its data port is tried by the move itself", ""
        )
        for check in (ROUND_TRIP, MTU, THROUGHPUT):
            yield check.unknown("the path was not looked at: the move's own rounds measure it", "")
        return
    yield _reachable(inspection, path)
    yield _round_trip(inspection, path)
    yield _mtu(inspection, path)
    yield _throughput(inspection, path)


def judge_alone(unanswered: Unanswered) -> Iterator[Finding]:
    """Say that the destination's agent was not to be had."""
    source_host, host = unanswered.source_host, unanswered.host
    if unanswered.is_denied:
        return
    yield REACHABLE.refused(
        f"{source_host} cannot talk to the agent of {host}: {unanswered.reason}",
        f"See that the agent of {host} runs, that address in [peers.{host}] of {source_host} is where it listens, and "
        "that TCP gets through to that port",
    )


def _way(inspection: Inspection) -> str:
    return f"from {inspection.source_host} to {inspection.host.name}"


def _reachable(inspection: Inspection, path: PathFacts) -> Finding:
    source, host = inspection.source_host, inspection.host.name
    if not path.data_error:
        return REACHABLE.ok(
            f"{source} reaches {host} on its control port and on its data port {path.data_port}"
        )
    there = inspection.there.capacity
    if not path.data_port and there is not None and there.moves.is_draining:
        # That has a finding of its own: whether the port is there for who begins later is not known.
        return REACHABLE.unknown(f"{host} answers on its control port, and opens no data port any more", "")
    if not path.data_port:
        return REACHABLE.refused(
            f"{host} answers on its control port and named no data port: {path.data_error}"
        )
    return REACHABLE.refused(
        f"{host} answers on its control port, and {source} cannot connect to its data port {path.data_port}: "
        f"{path.data_error}",
        f"Let TCP through from {source} to port {path.data_port} of {host}, which is data_listen of [agent] there: a "
        "fixed port, at an address that the source has a route to",
    )


def _round_trip(inspection: Inspection, path: PathFacts) -> Finding:
    # An answer of the agents contains the network's round trip, and is what the switchover waits for.
    round_trip_s = path.ping_s if path.ping_s is not None else path.rtt_s
    if round_trip_s is None:
        return ROUND_TRIP.unknown(f"the round trip {_way(inspection)} could not be measured")
    network = f" (the network alone {path.rtt_s * 1e3:.2f} ms)" if path.rtt_s is not None else ""
    found = (
        f"the round trip {_way(inspection)} takes {round_trip_s * 1e3:.2f} ms{network}: {SWITCHOVER_ROUND_TRIPS} of "
        f"them are {SWITCHOVER_ROUND_TRIPS * round_trip_s * 1e3:.1f} ms of downtime"
    )
    return ROUND_TRIP.warning(found) if round_trip_s > WARN_ROUND_TRIP_S else ROUND_TRIP.ok(found)


def _mtu(inspection: Inspection, path: PathFacts) -> Finding:
    if path.mtu_bytes is None and path.mss_bytes is None:
        return MTU.unknown(f"the kernel of {inspection.source_host} does not tell the path MTU")
    # The other end's segments may be smaller than this end's route tells.
    known = [size for size in (path.mtu_bytes, path.mss_bytes and path.mss_bytes + _HEADERS_BYTES) if size]
    mtu_bytes = min(known, default=0)
    found = (
        f"the path MTU {_way(inspection)} is {path.mtu_bytes or 'not known'}, in segments of {path.mss_bytes}"
    )
    if path.goodput_bytes_per_s == 0.0 and path.retransmits:
        return MTU.warning(
            f"{found}; greetings passed, and nothing larger did ({path.retransmits} retransmissions): something on the "
            "way seems to drop large packets in silence"
        )
    return MTU.warning(found) if mtu_bytes < WARN_MTU_BYTES else MTU.ok(found)


def _throughput(inspection: Inspection, path: PathFacts) -> Finding:
    goodput = path.goodput_bytes_per_s
    if goodput is None:
        return THROUGHPUT.unknown(
            f"the path {_way(inspection)} was not measured: {path.unmeasured or 'nothing is known of it'}",
            "Ask again, with --measure",
        )
    found = (
        f"{goodput / 1e6:.3g} MB/s passed {_way(inspection)} over {path.connections} connections in "
        f"{path.measured_s:.1f} s"
    )
    if path.retransmits:
        found += f", with {path.retransmits} retransmissions"
    if path.cap_bytes_per_s is not None:
        found += f" (bandwidth is capped at {path.cap_bytes_per_s / 1e6:.3g} MB/s)"
    if not goodput > 0 or not math.isfinite(goodput):
        cause = f": {path.unmeasured}" if path.unmeasured else ""
        return THROUGHPUT.refused(
            f"nothing passed {_way(inspection)} in {path.measured_s:.1f} s{cause}", MTU.remedy
        )
    ram_s = inspection.guest.ram_bytes / goodput
    found += (
        f": all RAM of {inspection.guest.name} ({inspection.guest.ram_bytes >> 20} MiB) takes {ram_s:.3g} s"
    )
    if 0 < inspection.time_limit_s < ram_s:
        return THROUGHPUT.warning(f"{found}, and a move may take {inspection.time_limit_s:g} s")
    return THROUGHPUT.ok(found)
