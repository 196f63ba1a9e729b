from __future__ import annotations

import pytest

from migrate.cpufiles import (
    MAX_DEPTH,
    MAX_FEATURES,
    MAX_FILE_BYTES,
    MAX_MODELS,
    CpuFileInvalid,
    read_cpu_files,
)
from migrate.facts import CpuFacts

# As libvirt 9 writes them.
VENDORS = b"<cpus><vendor name='Maker' string='MakerOfChips'/></cpus>"
OLD = b"""<!-- a comment -->
<cpus>
  <model name='Old'>
    <decode host='on' guest='on'/>
    <signature family='6' model='60'/> <!-- 0306c0 -->
    <signature family='6' model='63'/>
    <vendor name='Intel'/>
    <feature name='lahf_lm'/>
    <feature name='sse4.1'/>
    <feature name='pclmuldq'/>
    <feature name='monitor' removed='yes'/>
  </model>
</cpus>
"""
NEW = b"<cpus><model name='New'><model name='Old'/><vendor name='Maker'/><feature name='avx'/></model></cpus>"
CPUDEF = b"""# x86 CPU MODELS

[cpudef]
   name = "Nehalem"
   level = "2"
   vendor = "GenuineIntel"
   family = "6"
   model = "26"
   stepping = "3"
   feature_edx = "sse2 sse fxsr fpu"
   feature_ecx = "popcnt sse4.2|sse4_2 sse4.1 cx16 ssse3 sse3"
   extfeature_edx = "i64 syscall xd"
   extfeature_ecx = "lahf_lm"
   xlevel = "0x8000000A"
   model_id = "Intel Core i7 9xx (Nehalem Class Core i7)"

[machine]
   name = "ignored"
[cpudef]
   name = "Two"
   feature_edx = "fpu"
"""


def read(*contents: bytes) -> dict[str, CpuFacts]:
    return {cpu.model: cpu for cpu in read_cpu_files([(f"{n}", one) for n, one in enumerate(contents)])}


def test_libvirts_map_is_read_with_what_a_model_comes_from() -> None:
    cpus = read(NEW, OLD, VENDORS)
    assert list(cpus) == ["New", "Old"]
    assert cpus["Old"] == CpuFacts(
        model="Old", features=("lahf-lm", "pclmulqdq", "sse4.1"), vendor="GenuineIntel", family=6, number=60
    )
    assert cpus["New"].features == ("avx", "lahf-lm", "pclmulqdq", "sse4.1")
    # A file read before that of the makers keeps the maker's short name.
    assert (cpus["New"].vendor, cpus["New"].family) == ("Maker", 6)


def test_a_removed_feature_is_taken_from_what_a_model_comes_from() -> None:
    less = (
        b"<cpus><model name='Less'><model name='Old'/><feature name='sse4.1' removed='yes'/></model></cpus>"
    )
    assert read(OLD, less)["Less"].features == ("lahf-lm", "pclmulqdq")


def test_cpudefs_are_read() -> None:
    cpus = read(CPUDEF)
    assert list(cpus) == ["Nehalem", "Two"]
    assert cpus["Nehalem"] == CpuFacts(
        model="Nehalem",
        features=tuple(
            sorted(
                [
                    "sse2",
                    "sse",
                    "fxsr",
                    "fpu",
                    "popcnt",
                    "sse4.2",
                    "sse4.1",
                    "cx16",
                    "ssse3",
                    "pni",
                    "lm",
                    "syscall",
                    "nx",
                    "lahf-lm",
                ]
            )
        ),
        vendor="GenuineIntel",
        family=6,
        number=26,
        stepping=3,
        level=2,
        xlevel=0x8000000A,
    )


def models(count: int) -> bytes:
    return b"<cpus>" + b"".join(b"<model name='m%d'/>" % n for n in range(count)) + b"</cpus>"


def chain(length: int) -> bytes:
    each = (b"<model name='m%d'><model name='m%d'/></model>" % (n, n + 1) for n in range(length))
    return b"<cpus>" + b"".join(each) + b"<model name='m%d'/></cpus>" % length


def fat(count: int) -> bytes:
    features = b"".join(b"<feature name='f%d'/>" % n for n in range(count))
    return b"<cpus><model name='m'>" + features + b"</model></cpus>"


def test_limits_are_at_their_edges() -> None:
    assert len(read(models(MAX_MODELS))) == MAX_MODELS
    assert len(read(chain(MAX_DEPTH - 1))) == MAX_DEPTH
    assert len(read(fat(MAX_FEATURES))["m"].features) == MAX_FEATURES
    padding = b"<cpus/>" + b" " * (MAX_FILE_BYTES - 7)
    assert read(padding) == {}
    for beyond, words in (
        (models(MAX_MODELS + 1), "more than 1000 models"),
        (chain(MAX_DEPTH), "more than 32 others"),
        (fat(MAX_FEATURES + 1), "more than 1000 features"),
        (padding + b" ", "bytes"),
        (b"[cpudef]\n" * (MAX_MODELS + 1), "more than 1000 models"),
    ):
        with pytest.raises(CpuFileInvalid, match=words):
            read(beyond)
    with pytest.raises(CpuFileInvalid, match="1: more than 1000 models"):
        read(models(MAX_MODELS), CPUDEF)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"<!DOCTYPE a [<!ENTITY a 'aaaa'><!ENTITY b '&a;&a;'>]><cpus>&b;</cpus>", "document type"),
        (b"<!DOCTYPE a SYSTEM 'file:///etc/passwd'><cpus/>", "document type"),
        (b"<cpus>&undefined;</cpus>", "not XML"),
        (b"<cpus>", "not XML"),
        (b"<?xml version='1.0' encoding='rot13'?><cpus/>", "not XML"),
        (b"<a>" * 20, "more than 16 others"),
        (b"<cpus><model name='../x'/></cpus>", "no name of a model"),
        (b"<cpus><model name='m'><feature name='a b'/></model></cpus>", "no name of a feature"),
        (b"<cpus><model name='m'><signature family='x'/></model></cpus>", "no number"),
        (b"<cpus><model name='m'><model name='n'/></model></cpus>", "which no file defines"),
        (b"<cpus><model name='m'><model name='m'/></model></cpus>", "comes from itself"),
        (b"", "no <model> and no"),
        (b'name = "x"\n', "no <model> and no"),
        (b"[cpudef]\n", "no name of a model"),
        (b"[cpudef]\nname\n", "line 2 is neither"),
        (b'[cpudef]\nname = "m"\nlevel = "' + b"9" * 5000 + b'"\n', "no number of 32 bits"),
        (b'[cpudef]\nname = "m"\nxlevel = "0x100000000"\n', "no number of 32 bits"),
        (b'[cpudef]\nname = "m"\nfeature_edx = "a;b"\n', "no name of a feature"),
    ],
)
def test_what_is_not_read_is_said(content: bytes, words: str) -> None:
    with pytest.raises(CpuFileInvalid, match=f"^0: .*{words}|^model .*{words}"):
        read(content)
