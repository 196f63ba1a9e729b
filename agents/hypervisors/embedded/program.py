"""The guest's software: machine code, its parameters, its counters, and the RAM it finds at boot.

Law: pure numpy and bytes; no emulator. The source of the machine code is program.s beside this file, and a test
assembles it again. Addresses below are the `.set` lines of program.s.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from agents.hypervisors.embedded.spec import FIRST_FREE_BYTE, PAGE_BYTES, Content, EmbeddedSpec, Pattern

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "CODE",
    "CODE_ADDRESS",
    "COUNTERS_ADDRESS",
    "COUNTERS_BYTES",
    "DISK_WINDOW_SECTORS",
    "IDLE_TICKS_PER_S",
    "INSTRUCTIONS_PER_TICK",
    "PARAMETERS_ADDRESS",
    "Counters",
    "fill_pieces",
    "instructions_per_s",
    "page_factor",
    "parameters",
    "read_counters",
]

CODE_ADDRESS: Final = 0x1000
PARAMETERS_ADDRESS: Final = 0x2000
COUNTERS_ADDRESS: Final = 0x3000
COUNTERS_BYTES: Final = 32
# The program writes these sectors of its disk in turn, so a disk needs room for them and no more.
DISK_WINDOW_SECTORS: Final = 128
# Often enough that an idle guest's count is seen to go on, seldom enough to cost nothing.
IDLE_TICKS_PER_S: Final = 1000

# Length of the way from `tick` to `tick` without a heartbeat; it has no other branches that data decides.
# A test counts them.
INSTRUCTIONS_PER_TICK: Final = MappingProxyType(
    {
        (Pattern.HOT, Content.COMPRESSIBLE): 52,
        (Pattern.HOT, Content.INCOMPRESSIBLE): 65,
        (Pattern.RANDOM, Content.COMPRESSIBLE): 52,
        (Pattern.RANDOM, Content.INCOMPRESSIBLE): 65,
        (Pattern.SEQUENTIAL, Content.COMPRESSIBLE): 43,
        (Pattern.SEQUENTIAL, Content.INCOMPRESSIBLE): 56,
        (Pattern.IDLE, Content.COMPRESSIBLE): 8,
        (Pattern.IDLE, Content.INCOMPRESSIBLE): 8,
    }
)

CODE: Final = bytes.fromhex(
    "dbe3d9ee0fae14250c2000000f281425402000000f281c25502000004c8b04252820000049b92d7f954c2df4515849ba"
    "4f8167f77e7b05144c8b1c25102000004c8b2425182000004c8b2c2520200000488b2c25302000004531f64531ff31f6"
    "31ff49ffc64c893425003000008b04250020000083f80274390f870f0100004d0fafc14d01d04c89c048c1e8204c89c1"
    "48c1e91081e1ffff00004c89e23b0c2508200000490f42d5480fafc248c1e820eb0f48ffc731c04c39e7480f43f84889"
    "f848c1e00c498d1c034889d948c1e90c4831e94883c901488b034889c2480fafd1483b53080f857701000048ffc04889"
    "03480fafc848894b08b940000000c1e00625c00f00000f44c14801c3833c250420000000751a66490f6ec6660f6cc00f"
    "29030f2943100f2943200f294330eb53660f6fe3660f73d420660ff4da660fd4dc0f291b660f6fe3660f73d420660ff4"
    "da660fd4dc0f295b10660f6fe3660f73d420660ff4da660fd4dc0f295b20660f6fe3660f73d420660ff4da660fd4dc0f"
    "295b3049ffc74c893c25083000004c853425382000000f85c6feffffd9e8dec1dd14252030000048ff042518300000ba"
    "f8030000b074ee4c89f3b91000000048c1c30489d883e00f0fb68072120000eeffc975ebb00aeeba0c050000ed3dff00"
    "00000f847afeffff4c893425004000004c893c2508400000488934251040000048892c25f84100008b04251830000083"
    "e07fba00050000efb800400000ba04050000efb801000000ba08050000efb800420000ba04050000efb802000000ba08"
    "050000ef4c3b3425004200000f8410feffff48ffc64889342510300000e900feffff48ffc64889342510300000e979fe"
    "ffff30313233343536373839616263646566"
)

_PARAMETERS: Final = struct.Struct("<IIIIQQQQQQ QQ QQ")
_COUNTERS: Final = struct.Struct("<QQQQ")
_PATTERN_NUMBERS: Final = MappingProxyType(
    {Pattern.HOT: 0, Pattern.RANDOM: 1, Pattern.SEQUENTIAL: 2, Pattern.IDLE: 3}
)
_HOT_SHARE: Final = 65536 * 9 // 10
# All exceptions masked, round to nearest: what a CPU has after INIT.
_MXCSR: Final = 0x1F80
# 0xfffebb71 * 2^32 - 1 and half of it are prime: the longest period of a 32-bit multiply-with-carry.
_CARRY_FACTOR: Final = 0xFFFEBB71
_MASK: Final = (1 << 64) - 1
# A tile is what one `pwrite` of the firmware takes: large enough for full memory speed, small enough for L2.
_TILE_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Counters:
    """What the program says of itself, read from its counter page."""

    ticks: int
    pages_written: int
    errors: int
    heartbeats: int


def read_counters(page: bytes | memoryview) -> Counters:
    """Read them from the start of the counter page, at least COUNTERS_BYTES."""
    ticks, pages_written, errors, heartbeats = _COUNTERS.unpack_from(page)
    return Counters(ticks=ticks, pages_written=pages_written, errors=errors, heartbeats=heartbeats)


def instructions_per_s(spec: EmbeddedSpec) -> float:
    """Give the pace that makes the program write `spec.dirty_bytes_per_s`."""
    return _ticks_per_s(spec) * INSTRUCTIONS_PER_TICK[spec.pattern, spec.content]


def parameters(spec: EmbeddedSpec) -> bytes:
    """Give the block that the firmware puts at PARAMETERS_ADDRESS."""
    pages = spec.working_set_bytes // PAGE_BYTES
    seeds = _seeds(spec.seed)
    # One heartbeat a second or a little more often: the largest power of two within a second's ticks.
    beat_mask = (1 << (max(int(_ticks_per_s(spec)), 1).bit_length() - 1)) - 1
    return _PARAMETERS.pack(
        _PATTERN_NUMBERS[spec.pattern],
        1 if spec.content is Content.INCOMPRESSIBLE else 0,
        _HOT_SHARE if spec.pattern is Pattern.HOT else 0,
        _MXCSR,
        FIRST_FREE_BYTE,
        pages,
        max(pages // 10, 1),
        next(seeds),
        next(seeds),
        beat_mask,
        _CARRY_FACTOR,
        _CARRY_FACTOR,
        # A state of this generator must be below factor * 2^32 and neither 0 nor the largest.
        next(seeds) >> 1 | 1,
        next(seeds) >> 1 | 1,
    )


def page_factor(spec: EmbeddedSpec, gfn: int) -> int:
    """Give the odd number by which word 1 of a page of the working set is a multiple of word 0."""
    seeds = _seeds(spec.seed)
    next(seeds)
    return (gfn ^ next(seeds)) | 1


def fill_pieces(spec: EmbeddedSpec) -> Iterator[tuple[int, NDArray[np.uint64]]]:
    """Give (address, words) of the content that RAM has from boot on; the array is used again by the next.

    512 MiB take about 0.15 s: one tile is made, and the others are it with another constant mixed in, which
    leaves no two pages alike. The first 16 bytes of each page are zero, which the program's check accepts.
    """
    import numpy as np

    if not spec.fill_bytes:
        return
    generator = np.random.Generator(np.random.PCG64(spec.seed))
    words = generator.integers(0, 1 << 64, _TILE_BYTES // 8, dtype=np.uint64).reshape(-1, PAGE_BYTES // 8)
    if spec.content is Content.COMPRESSIBLE:
        # As much RAM is: half of a page zero, the rest small numbers that come again. zstd at level 1 makes
        # it 7 to 8 times smaller, at 0.7 GiB/s a core (2 vCPUs).
        words &= np.uint64(0xFFFF)
        words[:, 64:256] = np.tile(words[:, :64], (1, 3))
        words[:, 256:] = 0
    piece = np.empty_like(words)
    seeds = _seeds(spec.seed ^ _MASK)
    end = FIRST_FREE_BYTE + spec.fill_bytes
    for address in range(FIRST_FREE_BYTE, end, _TILE_BYTES):
        np.bitwise_xor(words, np.uint64(next(seeds)), out=piece)
        piece[:, :2] = 0
        pages = min(_TILE_BYTES, end - address) // PAGE_BYTES
        yield address, piece[:pages]


def _ticks_per_s(spec: EmbeddedSpec) -> float:
    if spec.pattern is Pattern.IDLE:
        return IDLE_TICKS_PER_S
    return spec.dirty_bytes_per_s / PAGE_BYTES


def _seeds(seed: int) -> Iterator[int]:
    """Give 64-bit numbers without end that look unlike each other even for neighbouring seeds.

    Source: SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
    """
    while True:
        seed = (seed + 0x9E3779B97F4A7C15) & _MASK
        mixed = ((seed ^ seed >> 30) * 0xBF58476D1CE4E5B9) & _MASK
        mixed = ((mixed ^ mixed >> 27) * 0x94D049BB133111EB) & _MASK
        yield mixed ^ mixed >> 31
