from __future__ import annotations

from pathlib import Path

from agents.hypervisors.hostmemory import free_memory_bytes, memory_limits


def host(root: Path, *, available_kb: int, limits: dict[str, tuple[str, int, int]]) -> int:
    (root / "meminfo").write_text(f"MemTotal: 99 kB\nMemAvailable:   {available_kb} kB\n")
    (root / "cgroup").write_text("1:name=x:/legacy\n0::/a/b\n")
    for group, (limit, used, cached) in limits.items():
        folder = root / "fs" / group
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 1\ninactive_file {cached}\n")
    return free_memory_bytes(root / "meminfo", root / "cgroup", root / "fs")


def test_without_limits_the_kernel_s_word_counts(tmp_path: Path) -> None:
    assert host(tmp_path, available_kb=1000, limits={"a/b": ("max", 5, 0)}) == 1000 << 10


def test_the_tightest_group_counts_and_its_cache_does_not(tmp_path: Path) -> None:
    limits = {"a/b": ("5000", 1000, 500), "a": ("3000", 1000, 0)}
    assert host(tmp_path, available_kb=1000, limits=limits) == 2000
    limits["a"] = ("9000", 1000, 0)
    assert host(tmp_path, available_kb=1000, limits=limits) == 4500


def test_every_group_s_limit_is_given_and_none_where_there_is_none(tmp_path: Path) -> None:
    host(tmp_path, available_kb=1, limits={"a/b": ("max", 5, 0), "a": ("3000", 9000, 0)})
    assert memory_limits(tmp_path / "cgroup", tmp_path / "fs") == [3000]
    assert memory_limits(tmp_path / "none", tmp_path / "fs") == []


def test_a_group_over_its_limit_has_nothing_and_not_less(tmp_path: Path) -> None:
    assert host(tmp_path, available_kb=1000, limits={"a": ("100", 900, 0)}) == 0


def test_without_proc_nothing_is_free(tmp_path: Path) -> None:
    assert free_memory_bytes(tmp_path / "none", tmp_path / "none", tmp_path / "none") == 0


def test_this_host_has_some_memory() -> None:
    assert free_memory_bytes() > 0
