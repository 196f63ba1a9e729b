"""The descriptions on the page that people read are ones that load."""

from __future__ import annotations

from pathlib import Path

import pytest

from agents.hypervisors.qemu.spec import Cache, QemuSpec

PAGE = Path(__file__).parents[4] / "docs" / "qemu.md"
BLOCKS = [block.split("```")[0] for block in PAGE.read_text().split("```toml\n")[1:]]


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_a_documented_description_loads(block: str, tmp_path: Path) -> None:
    path = tmp_path / "web1.toml"
    path.write_text(block)
    spec = QemuSpec.from_toml(path)
    assert spec.name == "web1"
    assert spec.ram_bytes == 2 << 30


def test_the_documented_defaults_are_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "web1.toml"
    path.write_text('machine = "pc-q35-7.2"\ncpu = "Nehalem"\nmemory = "2GiB"\n')
    shortest = QemuSpec.from_toml(path)
    path.write_text(BLOCKS[0])
    spelled = QemuSpec.from_toml(path)
    for name in ("name", "machine", "accel", "vga", "has_balloon", "has_rng"):
        assert getattr(spelled, name) == getattr(shortest, name)
    assert spelled.disks[0].cache is Cache.NONE
