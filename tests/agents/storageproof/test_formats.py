from __future__ import annotations

import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agents.storageproof.chains import MAX_CHAIN, head_of, under
from agents.storageproof.formats import (
    HEAD_BYTES,
    MAX_EXTENSIONS,
    MAX_NAME_BYTES,
    FormatInvalid,
    format_of,
    parse_qcow2,
)
from agents.storageproof.places import SharedPlaces
from tests.agents.storageproof.headers import header


def make(path: Path, *arguments: str, size: str = "1M") -> Path:
    subprocess.run(["qemu-img", "create", "-q", *arguments, path, size], check=True)
    return path


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_what_qemu_writes_is_read(tmp_path: Path, compat: str) -> None:
    make(tmp_path / "base.raw", "-f", "raw")
    top = make(
        tmp_path / "top.qcow2", *("-f", "qcow2", "-o", f"compat={compat}", "-b", "base.raw", "-F", "raw")
    )
    subprocess.run(["qemu-img", "snapshot", "-c", "one", top], check=True)
    found = parse_qcow2(head_of(top))
    assert (found.backing, found.backing_format, found.virtual_bytes) == ("base.raw", "raw", 1 << 20)
    assert (found.version, found.snapshots) == (2 if compat == "0.10" else 3, 1)


def test_data_in_another_file_is_part_of_the_chain(tmp_path: Path) -> None:
    top = make(tmp_path / "top.qcow2", "-f", "qcow2", "-o", f"data_file={tmp_path}/data.raw")
    found = parse_qcow2(head_of(top))
    assert found.data_file == f"{tmp_path}/data.raw"
    (data,), problem = under(top, found, SharedPlaces.of([tmp_path]))
    assert (data.path, data.error, problem) == (f"{tmp_path}/data.raw", "", "")


@pytest.mark.parametrize("format_", ["raw", "qcow2", "qed", "vdi", "vmdk", "vhdx", "vpc"])
def test_formats_are_told_by_their_first_bytes(tmp_path: Path, format_: str) -> None:
    assert format_of(head_of(make(tmp_path / "image", "-f", format_))) == format_


def test_names_and_extensions_have_limits() -> None:
    assert parse_qcow2(header(backing=b"x" * MAX_NAME_BYTES)).backing == "x" * MAX_NAME_BYTES
    one = struct.pack(">IIQ", 1, 8, 0)
    parse_qcow2(header(extensions=one * (MAX_EXTENSIONS - 1) + bytes(8)))
    for wrong in (
        header(backing=b"x" * (MAX_NAME_BYTES + 1)),
        header(backing=b"\xff"),
        header(backing=b"a\0b"),
        header(extensions=one * (MAX_EXTENSIONS + 1) + bytes(8)),
        header(extensions=struct.pack(">II", 1, 1 << 31)),
        header(version=4),
        header(cluster_bits=22),
        header()[:90],
    ):
        with pytest.raises(FormatInvalid):
            parse_qcow2(wrong)


def test_a_chain_that_names_itself_or_a_server_ends(tmp_path: Path) -> None:
    loop = tmp_path / "loop.qcow2"
    fmt = struct.pack(">II", 0xE2792ACA, 5) + b"qcow2\0\0\0"
    loop.write_bytes(header(backing=b"loop.qcow2", extensions=fmt + bytes(8)).ljust(HEAD_BYTES, b"\0"))
    places = SharedPlaces.of([tmp_path])
    found, problem = under(loop, parse_qcow2(head_of(loop)), places)
    assert len(found) == MAX_CHAIN
    assert str(MAX_CHAIN) in problem
    loop.write_bytes(header(backing=b"nbd://host/x").ljust(HEAD_BYTES, b"\0"))
    (one,), _ = under(loop, parse_qcow2(head_of(loop)), places)
    assert "is no file" in one.error


@given(
    st.binary(max_size=300).map(lambda tail: b"QFI\xfb" + tail)
    | st.binary(max_size=40).map(lambda words: header(backing=words, extensions=words + bytes(8)))
)
def test_garbage_raises_only_format_invalid(head: bytes) -> None:
    try:
        found = parse_qcow2(head)
    except FormatInvalid:
        return
    assert len(found.backing) <= MAX_NAME_BYTES
