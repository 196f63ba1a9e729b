"""Does a stock QEMU guest move faster, and stand still for less, than QEMU moves it by itself?

The same guest from the same saved state, moved by vmferry and by QEMU's own migration in six configurations, in turns;
on loopback and over cables of 1 Gbit/s and 100 Mbit/s, writing 10 and 200 MiB/s. The start of the destination's QEMU
counts for both. What is compared is vmferry with the best *encrypted* configuration of each row.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from agents.demo.errors import NoQemu
from agents.demo.qemu import best_accel, find_qemu
from agents.testguest.image import KernelMissing, find_kernel
from bench.qemu.links import LINKS, cable, can_make_links
from bench.qemu.native import WAYS
from bench.qemu.place import furnish
from bench.qemu.source import Place, save_guest
from bench.qemu.worker import VMFERRY

QUESTION: Final = (
    "Does a stock QEMU guest move faster, and stand still for less, than QEMU moves it by itself?"
)

MIB: Final = 1 << 20
RAM_BYTES: Final = 512 * MIB
# The working set is written at the rate, the rest stays: 240 MiB with Linux itself, a quarter of it noise.
SET_MIB: Final = 64
FILL_MIB: Final = 128
RATES: Final = (10, 200)
# QEMU's downtimes on a fast link are of two kinds, 10 ms and some hundred: a median of few moves is either. Fewer where
# a round takes ten minutes.
ROUNDS: Final = {"loopback": 15, "1gbit": 9, "100mbit": 3}
# A move that has not ended by then does not converge.
TIMEOUT_S: Final = {"loopback": 30.0, "1gbit": 40.0, "100mbit": 90.0}
GOALS: Final = {"downtime": 0.3, "total_loopback": 0.7, "cpu_loopback": 0.8, "total_1gbit": 0.9}

Rows = dict[str, list[dict[str, float]]]


def run(smoke: bool, rows: Sequence[str] = (), ways: Sequence[str] = ()) -> dict[str, object]:
    """Give medians of each way in each row, and the ratios of vmferry to the best encrypted one.

    `rows` are those that are wanted, as LINK_wrRATE, and `ways` the configurations of QEMU; empty means all.
    """
    known = [_row(link, rate) for rate in RATES for link in LINKS]
    if strange := sorted(set(rows) - set(known)):
        raise ValueError(f"no row {', '.join(strange)}; there are: {', '.join(known)}")
    names = [way.name for way in WAYS]
    if strange := sorted(set(ways) - set(names)):
        raise ValueError(f"no way {', '.join(strange)}; there are: {', '.join(names)}")
    try:
        binary, kernel = find_qemu(), find_kernel()
    except (NoQemu, KernelMissing) as exc:
        return {"skipped": str(exc)}
    links = list(LINKS) if can_make_links() and not smoke else ["loopback"]
    folder = Path(tempfile.mkdtemp(prefix="vmf-bench-"))
    figures: dict[str, object] = {"qemu_version": _version(binary), "accel": str(best_accel())}
    try:
        place = Place(folder=folder, binary=binary, accel=best_accel())
        furnish(place, kernel)
        for rate in RATES[:1] if smoke else RATES:
            words = f"set={SET_MIB} fill={FILL_MIB} rate={rate}"
            save_guest(place, ram_bytes=RAM_BYTES, words=words)
            for link in links:
                row = _row(link, rate)
                if rows and row not in rows:
                    continue
                wanted = ["tls"] if smoke else [name for name in names if name in (ways or names)]
                moves = _measure(place, link, words, wanted, 1 if smoke else ROUNDS[link])
                figures |= dict(_figures(row, moves))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return figures


def _measure(place: Place, link: str, words: str, ways: Sequence[str], rounds: int) -> Rows:
    order = place.folder / f"order-{link}.json"
    order.write_text(
        json.dumps(
            {
                "link": link,
                "folder": str(place.folder),
                "binary": str(place.binary),
                "accel": str(place.accel),
                "ram_bytes": RAM_BYTES,
                "words": words,
                "ways": ways,
                "rounds": rounds,
                "timeout_s": TIMEOUT_S[link],
            }
        )
    )
    rows: Rows = {name: [] for name in (VMFERRY, *ways)}
    with cable(LINKS[link]):
        command = [*LINKS[link].prefixes[0], sys.executable, "-m", "bench.qemu.worker", str(order)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as worker:
            for line in worker.stdout or ():
                one = json.loads(line)
                print(f"{link} {words}: {line.rstrip()}", file=sys.stderr, flush=True)
                rows[one.pop("way")].append(one)
        if worker.returncode:
            raise RuntimeError(f"the worker over {link} ended with {worker.returncode}")
    return rows


def _row(link: str, rate: int) -> str:
    return f"{link}_wr{rate}"


def _figures(row: str, rows: Rows) -> Iterator[tuple[str, object]]:
    """Give the medians of a row, and vmferry's ratios to the best encrypted way for each figure."""
    medians = {way: _medians(moves) for way, moves in rows.items()}
    encrypted = [way.name for way in WAYS if way.is_tls and way.name in medians]
    for way, seen in medians.items():
        name = f"{row}_{way.replace('+', '_')}"
        yield f"{name}_ended", f"{sum(bool(move['has_ended']) for move in rows[way])} of {len(rows[way])}"
        for figure, value in seen.items():
            yield f"{name}_{figure}", value
    for figure in ("downtime_ms", "gap_ms", "total_s", "cpu_s", "wire_bytes"):
        best = min((medians[way][figure] for way in encrypted if figure in medians[way]), default=None)
        if best and figure in medians[VMFERRY]:
            yield f"{row}_{figure.rsplit('_', 1)[0]}_to_best_encrypted_ratio", medians[VMFERRY][figure] / best


def _medians(moves: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Give the medians of the moves that ended; nothing where most did not."""
    ended = [move for move in moves if move["has_ended"]]
    if 2 * len(ended) <= len(moves):
        return {}
    return {
        figure: statistics.median(move[figure] for move in ended)
        for figure in ("total_s", "downtime_ms", "gap_ms", "disturbed_ms", "wire_bytes", "cpu_s", "peak_mib")
    }


def _version(binary: Path) -> str:
    said = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True).stdout
    return said.split("\n", 1)[0].removeprefix("QEMU emulator version ")
