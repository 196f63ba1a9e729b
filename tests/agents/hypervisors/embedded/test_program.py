from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from agents.hypervisors.embedded import program
from agents.hypervisors.embedded.devices import NoSectors
from agents.hypervisors.embedded.machine import Machine
from agents.hypervisors.embedded.ramfile import RamFile
from agents.hypervisors.embedded.spec import FIRST_FREE_BYTE, PAGE_BYTES, Content, EmbeddedSpec, Pattern
from tests.agents.hypervisors.embedded.conftest import SpecMaker

SOURCE = Path(program.__file__).with_name("program.s")
EVERY_WORKLOAD = [(pattern, content) for pattern in Pattern for content in Content]


def test_the_machine_code_is_what_its_source_says(tmp_path: Path) -> None:
    if not (shutil.which("as") and shutil.which("objcopy")):
        pytest.skip("needs binutils")
    object_file, binary = tmp_path / "program.o", tmp_path / "program.bin"
    assembled = subprocess.run(
        ["as", "--64", SOURCE, "-o", object_file], capture_output=True, text=True, check=False
    )
    if "unrecognized option" in assembled.stderr:
        pytest.skip("this assembler is not for x86-64")
    assert assembled.returncode == 0, assembled.stderr
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", object_file, binary], check=True)
    assert binary.read_bytes() == program.CODE


@pytest.mark.parametrize(("pattern", "content"), EVERY_WORKLOAD)
def test_a_tick_takes_the_number_of_instructions_that_the_pace_counts_on(
    make_spec: SpecMaker, pattern: Pattern, content: Content
) -> None:
    # At the highest rate the first heartbeat is far away.
    spec = make_spec(pattern=pattern, content=content, dirty_bytes_per_s=4 << 30)
    per_tick = program.INSTRUCTIONS_PER_TICK[pattern, content]
    ram = RamFile(spec.ram_bytes)
    machine = Machine(spec, ram, NoSectors())
    machine.boot()
    machine.run_slice(per_tick * 3)
    before = machine.counters()
    machine.run_slice(per_tick * 100)
    after = machine.counters()
    ram.close()
    assert after.ticks - before.ticks == 100
    assert after.pages_written - before.pages_written == (0 if pattern is Pattern.IDLE else 100)


def _page_counts(spec: EmbeddedSpec, *, ticks: int) -> NDArray[np.uint64]:
    """Run so many ticks, and give how often the guest wrote each page of its working set."""
    ram = RamFile(spec.ram_bytes)
    machine = Machine(spec, ram, NoSectors())
    machine.boot()
    machine.run_slice(program.INSTRUCTIONS_PER_TICK[spec.pattern, spec.content] * ticks)
    end = FIRST_FREE_BYTE + spec.working_set_bytes
    counts = np.frombuffer(bytes(ram.view[FIRST_FREE_BYTE:end]), np.uint64)[:: PAGE_BYTES // 8]
    written = machine.counters().pages_written
    ram.close()
    # One page may be counted in its own word and not yet in the counter.
    assert int(counts.sum()) - written in (0, 1)
    return counts


def test_the_pace_follows_the_rate(make_spec: SpecMaker) -> None:
    spec = make_spec(dirty_bytes_per_s=1000 * PAGE_BYTES)
    per_tick = program.INSTRUCTIONS_PER_TICK[spec.pattern, spec.content]
    assert program.instructions_per_s(spec) == 1000 * per_tick


def test_the_hot_part_gets_nine_writes_of_ten(make_spec: SpecMaker) -> None:
    spec = make_spec(pattern=Pattern.HOT, working_set_bytes=100 * PAGE_BYTES, fill_bytes=0)
    counts = _page_counts(spec, ticks=20000)
    # The hot part also has its share of the writes that go anywhere: 90 % + 10 % of 10 %.
    assert 0.89 < counts[:10].sum() / counts.sum() < 0.93
    assert (counts[10:] > 0).all()


def test_random_reaches_every_page_alike(make_spec: SpecMaker) -> None:
    spec = make_spec(pattern=Pattern.RANDOM, working_set_bytes=100 * PAGE_BYTES, fill_bytes=0)
    counts = _page_counts(spec, ticks=20000)
    assert counts.min() > 100
    assert counts.max() < 320


def test_sequential_goes_round(make_spec: SpecMaker) -> None:
    spec = make_spec(pattern=Pattern.SEQUENTIAL, working_set_bytes=100 * PAGE_BYTES, fill_bytes=0)
    counts = _page_counts(spec, ticks=1000)
    assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize("content", Content)
def test_no_two_pages_are_alike_at_boot_and_none_is_zero(make_spec: SpecMaker, content: Content) -> None:
    spec = make_spec(content=content, ram_bytes=8 << 20, fill_bytes=3 << 20)
    pages = np.concatenate([words.copy() for _, words in program.fill_pieces(spec)])
    assert len(pages) * PAGE_BYTES == spec.fill_bytes
    assert len(np.unique(pages, axis=0)) == len(pages)
    assert not pages[:, :2].any()
    assert pages[:, 2:].any(axis=1).all()


def test_the_content_follows_the_seed_and_the_kind(make_spec: SpecMaker) -> None:
    def first_piece(**changes: object) -> bytes:
        address, words = next(program.fill_pieces(make_spec(**changes)))
        assert address == FIRST_FREE_BYTE
        return words.tobytes()

    assert first_piece() == first_piece()
    assert len({first_piece(), first_piece(seed=2), first_piece(content=Content.INCOMPRESSIBLE)}) == 3


def test_a_guest_without_content_has_none(make_spec: SpecMaker) -> None:
    assert list(program.fill_pieces(make_spec(fill_bytes=0))) == []
