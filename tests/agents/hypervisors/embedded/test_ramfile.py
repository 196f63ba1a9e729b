from __future__ import annotations

import os

import pytest

from agents.hypervisors.embedded.ramfile import RAM_BLOCK, RamFile, ram_layout
from memory.ram import MappedRam


def test_new_ram_is_a_hole_of_its_size_in_one_block() -> None:
    ram = RamFile(1 << 20)
    assert os.fstat(ram.fd).st_blocks == 0
    assert len(ram.view) == ram.ram_bytes == 1 << 20
    assert [(block.name, block.pages) for block in ram_layout(1 << 20).blocks] == [(RAM_BLOCK, 256)]
    ram.close()


def test_the_mapping_the_file_and_an_agent_s_view_of_it_are_the_same_bytes() -> None:
    ram = RamFile(1 << 20)
    agent = MappedRam(ram.fd, ram_layout(ram.ram_bytes))
    ram.write(4096, b"by the file")
    ram.view[8192:8202] = b"by mapping"
    assert agent.populated_runs().tolist() == [[1, 2]]
    pages = bytearray(8192)
    agent.gather(agent.populated_runs(), memoryview(pages))
    assert pages.startswith(b"by the file")
    assert pages[4096:].startswith(b"by mapping")
    agent.close()
    ram.close()


def test_nobody_can_cut_the_file_under_the_mapping() -> None:
    ram = RamFile(1 << 20)
    with pytest.raises(PermissionError):
        os.ftruncate(ram.fd, 4096)
    ram.close()
