"""QEMU moves a guest itself, as it is told in its own words.

Law: the destination's QEMU is started within the measured time, as vmferry's is. Downtime limit and content are the
same.
"""

from __future__ import annotations

import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.qemu.figures import Figures
from bench.qemu.links import Link
from bench.qemu.qmp import Qmp, stamp_s
from bench.qemu.source import Beats, Meter, Source, end_qemu

__all__ = ["WAYS", "Way", "move"]

# As those of the agents, below the range that the kernel takes for connections.
PORT: Final = 27111
DOWNTIME_LIMIT_MS: Final = 300
CHANNELS: Final = 2
UNLIMITED: Final = 1 << 40
# For the first heartbeats at the destination to arrive.
SETTLE_S: Final = 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One configuration of QEMU's own migration."""

    name: str
    is_multifd: bool = False
    is_tls: bool = False
    compression: str = "none"
    is_xbzrle: bool = False


WAYS: Final = (
    Way(name="plain"),
    Way(name="tls", is_tls=True),
    Way(name="multifd", is_multifd=True),
    Way(name="multifd+tls", is_multifd=True, is_tls=True),
    Way(name="multifd+zstd+tls", is_multifd=True, is_tls=True, compression="zstd"),
    Way(name="xbzrle", is_xbzrle=True),
)


def move(source: Source, link: Link, way: Way, pki: Path, timeout_s: float) -> Figures:
    """Move a running guest; give what it took. It ends on both hosts."""
    place, spec = source.place, source.spec
    there = place.paths("host-b", spec.guest_id)
    wire_before = link.wire_bytes()
    with Meter({"source": source.pid}) as meter, Qmp(place.paths("host-a", spec.guest_id).monitor) as qmp:
        _tell(qmp, way, pki, "client")
        began_s = time.time()
        argv = [word for word in place.argv("host-b", spec) if word != "-daemonize"]
        process = subprocess.Popen(
            [*link.prefixes[1], *argv, "-incoming", "defer"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        beats = Beats(there, source.beats.offset)
        try:
            meter.add("destination", process.pid)
            with Qmp(there.monitor) as other:
                _tell(other, way, pki, "server")
                other.ask("migrate-incoming", {"uri": f"tcp:{link.addresses[1]}:{PORT}"})
                qmp.events.clear()
                qmp.ask("migrate", {"uri": f"tcp:{link.addresses[1]}:{PORT}"})
                try:
                    resumed_s = stamp_s(other.wait_event("RESUME", timeout_s))
                    stopped_s = stamp_s(qmp.wait_event("STOP", 10))
                except TimeoutError:
                    return Figures.endless(timeout_s)
                meter.stop()
                wire_bytes = link.wire_bytes() - wire_before
                time.sleep(SETTLE_S)
        finally:
            process.kill()
            process.wait()
            beats.close()
            end_qemu(there)
    return Figures.of(
        began_s=began_s,
        stopped_s=stopped_s,
        resumed_s=resumed_s,
        wire_bytes=wire_bytes,
        meter=meter,
        here=source.beats,
        there=beats,
    )


def _tell(qmp: Qmp, way: Way, pki: Path, endpoint: str) -> None:
    capabilities = {"multifd": way.is_multifd, "xbzrle": way.is_xbzrle, "events": True}
    qmp.ask(
        "migrate-set-capabilities",
        {"capabilities": [{"capability": name, "state": on} for name, on in capabilities.items()]},
    )
    parameters: dict[str, object] = {"max-bandwidth": UNLIMITED, "downtime-limit": DOWNTIME_LIMIT_MS}
    if way.is_multifd:
        parameters |= {"multifd-channels": CHANNELS, "multifd-compression": way.compression}
    if way.is_xbzrle:
        parameters["xbzrle-cache-size"] = 512 << 20
    if way.is_tls:
        credentials = {"qom-type": "tls-creds-x509", "id": "tls0", "dir": str(pki), "endpoint": endpoint}
        qmp.ask("object-add", {**credentials, "verify-peer": True})
        parameters |= {"tls-creds": "tls0", "tls-hostname": "bench"}
    qmp.ask("migrate-set-parameters", parameters)
