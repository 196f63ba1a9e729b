"""Every target holds its law for its seeds, and for inputs that are a few mutations away; no atheris needed."""

from __future__ import annotations

import random

import pytest

from tests.fuzz.targets import TARGETS

RUNS = 60
_NOISE = (
    b"\0",
    b"\xff" * 4,
    b"[" * 2000,
    b"9" * 5000,
    b"1e999999999",
    b"\xdd\xff\xff\xff\xff",
    b"\n",
    b"\xc2",
)


def mutated(data: bytes, rng: random.Random) -> bytes:
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


@pytest.mark.parametrize("name", TARGETS)
def test_the_law_holds_for_seeds_and_for_what_is_near_them(name: str) -> None:
    target, rng = TARGETS[name], random.Random(name)
    seeds = target.seeds()
    for seed in (b"", *seeds):
        target.check(seed)
    for _ in range(RUNS):
        target.check(mutated(rng.choice(seeds), rng)[: target.most_input_bytes])
