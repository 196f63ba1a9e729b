"""Runs a target without atheris: seeds, past findings and inputs some mutations away, with no coverage to guide them.

Law: one seed gives the same inputs each time. The first finding ends a target's run and is written to its folder.
"""

from __future__ import annotations

import hashlib
import random
import time
import traceback
from itertools import count
from pathlib import Path
from typing import Final

from tests.fuzz.past import PAST
from tests.fuzz.running import FuzzFigures
from tests.fuzz.target import Target

__all__ = ["mutated", "run_plain"]

_NOISE: Final = (
    *(
        b"\0",
        b"\xff" * 4,
        b"[" * 2000,
        b"9" * 5000,
        b"1e999999999",
        b"\xdd\xff\xff\xff\xff",
        b"\n",
        b"\r",
        b"\xc2",
    ),
)


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Give an input that is one to four changes away."""
    raw = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(raw) + 1)
        match rng.randrange(4):
            case 0:
                raw[at : at + 1] = rng.randbytes(1)
            case 1:
                del raw[at : at + rng.randint(1, 16)]
            case 2:
                raw[at:at] = rng.choice(_NOISE)
            case _:
                raw[at:at] = raw[: rng.randint(0, 64)]
    return bytes(raw)


def run_plain(
    target: Target, folder: Path, *, runs: int = -1, seconds: int = 0, seed: int = 0
) -> FuzzFigures:
    """Feed `runs` inputs, or as many as `seconds` hold; seed 0 is another one each time."""
    rng = random.Random(seed or None)
    known = (b"", *target.seeds(), *PAST.get(target.name, ()))
    findings = folder / target.name / "findings"
    findings.mkdir(parents=True, exist_ok=True)
    log = folder / target.name / "log"
    log.write_text("")
    began_s = time.monotonic()
    executions = 0
    for number in count():
        if number == runs or (seconds and time.monotonic() - began_s >= seconds):
            break
        data = known[number] if number < len(known) else mutated(rng.choice(known), rng)
        executions += 1
        try:
            target.check(data[: target.most_input_bytes])
        except Exception:
            log.write_text(traceback.format_exc())
            (findings / f"crash-{hashlib.sha256(data).hexdigest()[:16]}").write_bytes(
                data[: target.most_input_bytes]
            )
            break
    return FuzzFigures(
        name=target.name,
        executions=executions,
        executions_per_s=int(executions / max(time.monotonic() - began_s, 1e-3)),
        edges=0,
        findings=tuple(sorted(findings.iterdir())),
        log=log,
        has_ended=True,
    )
