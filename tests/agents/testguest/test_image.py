from __future__ import annotations

import gzip
import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from agents.testguest.image import (
    KERNEL_VARIABLE,
    WORKLOAD,
    Heartbeat,
    KernelMissing,
    find_kernel,
    heartbeats,
    initramfs,
)


def test_the_workload_was_built_from_the_source_beside_it() -> None:
    source = WORKLOAD.with_suffix(".c").read_bytes()
    assert b"vmferry-workload " + hashlib.sha256(source).hexdigest().encode() in WORKLOAD.read_bytes()


@pytest.mark.slow
def test_the_workload_writes_beats_and_finds_its_memory_as_it_left_it() -> None:
    with subprocess.Popen([WORKLOAD, "set=4", "rate=8", "fill=2"], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            console = b"".join(process.stdout.readline() for _ in range(4))
        finally:
            process.kill()
    beats = heartbeats(console)
    assert len(beats) == 3
    assert [beat.errors for beat in beats] == [0, 0, 0]
    assert beats[0].writes < beats[1].writes < beats[2].writes


def test_only_whole_lines_of_heartbeats_are_read() -> None:
    console = b"READY\r\nHB 200 writes=3 checks=4 errors=1 maxgap_us=1500\r\nHB 400 writes=9"
    assert heartbeats(console) == [
        Heartbeat(since_start_s=0.2, writes=3, checks=4, errors=1, max_gap_s=0.0015)
    ]


@pytest.mark.skipif(shutil.which("cpio") is None, reason="needs cpio to unpack what was packed")
def test_another_program_unpacks_the_archive(tmp_path: Path) -> None:
    archive = gzip.decompress(initramfs({"bin/tool": b"#!/bin/true\n", "etc/name": b"x" * 5}))
    listing = subprocess.run(["cpio", "-itv"], input=archive, capture_output=True, check=True, cwd=tmp_path)
    names = {line.split()[-1] for line in listing.stdout.decode().splitlines()}
    assert names == {
        "bin",
        "bin/tool",
        "bin/workload",
        "dev",
        "dev/console",
        "etc",
        "etc/name",
        "init",
        "proc",
        "sys",
    }
    wanted = ["init", "bin/tool", "etc/name"]
    subprocess.run(["cpio", "-id", *wanted], input=archive, capture_output=True, check=True, cwd=tmp_path)
    assert (tmp_path / "init").read_bytes() == WORKLOAD.read_bytes()
    assert (tmp_path / "etc/name").read_bytes() == b"x" * 5
    assert os.access(tmp_path / "init", os.X_OK)


def test_equal_contents_make_equal_archives() -> None:
    assert initramfs() == initramfs()


def test_the_kernel_that_is_named_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kernel").touch()
    monkeypatch.setenv(KERNEL_VARIABLE, str(tmp_path / "kernel"))
    assert find_kernel() == tmp_path / "kernel"
    monkeypatch.setenv(KERNEL_VARIABLE, str(tmp_path / "none"))
    with pytest.raises(KernelMissing, match=re.escape(KERNEL_VARIABLE)):
        find_kernel()


def test_the_newest_kernel_is_found_by_number_and_not_by_letter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(KERNEL_VARIABLE, raising=False)
    monkeypatch.setattr("agents.testguest.image._BOOT", tmp_path)
    with pytest.raises(KernelMissing, match="none is there"):
        find_kernel()
    for name in ("vmlinuz-6.9.1-1-amd64", "vmlinuz-6.10.1-1-amd64"):
        (tmp_path / name).touch()
    assert find_kernel().name == "vmlinuz-6.10.1-1-amd64"
