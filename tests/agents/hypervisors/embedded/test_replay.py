from __future__ import annotations

from pathlib import Path

import pytest

from agents.hypervisors.embedded.devices import MemorySectors
from agents.hypervisors.embedded.replay import replay
from tests.agents.hypervisors.embedded.conftest import SpecMaker


def test_a_replay_is_the_same_each_time_and_differs_with_each_instruction(make_spec: SpecMaker) -> None:
    spec = make_spec()
    assert replay(spec, 20_000) == replay(spec, 20_000)
    assert replay(spec, 20_000)[1] != replay(spec, 20_001)[1]


def test_a_replay_leaves_the_guest_s_disk_alone(make_spec: SpecMaker, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(128 * 512))
    with_disk = make_spec(disk_path=str(disk), dirty_bytes_per_s=64 * 4096)
    assert replay(with_disk, 20_000) != replay(make_spec(dirty_bytes_per_s=64 * 4096), 20_000)
    assert disk.read_bytes() == bytes(128 * 512)


def test_a_replay_ends_where_the_guest_does(make_spec: SpecMaker) -> None:
    assert replay(make_spec(max_instructions=5000), 9999) == replay(make_spec(max_instructions=5000), 5000)


def test_another_seed_is_another_guest(make_spec: SpecMaker) -> None:
    assert replay(make_spec(seed=1), 5000)[0] != replay(make_spec(seed=2), 5000)[0]


def test_a_replay_writes_to_the_sectors_it_is_given(make_spec: SpecMaker, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(128 * 512))
    spec = make_spec(disk_path=str(disk), dirty_bytes_per_s=64 * 4096)
    sectors = MemorySectors()
    assert replay(spec, 20_000, sectors=sectors) == replay(spec, 20_000)
    assert any(sectors.read(sector) != bytes(512) for sector in range(128))


def test_whoever_hears_of_a_replay_s_progress_can_end_it(make_spec: SpecMaker) -> None:
    heard: list[int] = []

    def end(instructions: int) -> None:
        heard.append(instructions)
        raise InterruptedError

    with pytest.raises(InterruptedError):
        replay(make_spec(), 20_000, on_progress=end)
    assert heard == [20_000]
