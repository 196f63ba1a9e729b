from __future__ import annotations

from pathlib import Path

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unicorn import x86_const

from agents.hypervisors.embedded import spec as spec_module
from agents.hypervisors.embedded.errors import SpecInvalid
from agents.hypervisors.embedded.spec import (
    CPU_MODELS,
    FIRST_FREE_BYTE,
    MAX_DIRTY_BYTES_PER_S,
    MAX_RAM_BYTES,
    MAX_SPEC_BYTES,
    MIN_RAM_BYTES,
    PAGE_BYTES,
    Content,
    EmbeddedSpec,
    Pattern,
)
from tests.agents.hypervisors.embedded.conftest import GUEST_ID, SpecMaker

GOLDEN = Path(__file__).parents[3] / "vectors" / "embedded_spec_v1.bin"


@st.composite
def specs(draw: st.DrawFn) -> EmbeddedSpec:
    ram_pages = draw(st.integers(MIN_RAM_BYTES // PAGE_BYTES, MAX_RAM_BYTES // PAGE_BYTES))
    room_pages = ram_pages - FIRST_FREE_BYTE // PAGE_BYTES
    return EmbeddedSpec(
        guest_id=str(draw(st.uuids())),
        name=draw(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", fullmatch=True)),
        ram_bytes=ram_pages * PAGE_BYTES,
        cpu_model=draw(st.sampled_from(list(CPU_MODELS))),
        pattern=draw(st.sampled_from(Pattern)),
        dirty_bytes_per_s=draw(st.integers(PAGE_BYTES, MAX_DIRTY_BYTES_PER_S)),
        working_set_bytes=draw(st.integers(1, room_pages)) * PAGE_BYTES,
        content=draw(st.sampled_from(Content)),
        fill_bytes=draw(st.integers(0, room_pages)) * PAGE_BYTES,
        seed=draw(st.integers(0, 2**64 - 1)),
        disk_path=draw(st.none() | st.just("/shared/disk.img")),
        max_instructions=draw(st.none() | st.integers(1, 1 << 62)),
    )


@settings(deadline=None, max_examples=50)
@given(specs())
def test_what_is_written_is_read_again(spec: EmbeddedSpec) -> None:
    assert EmbeddedSpec.from_bytes(spec.to_bytes()) == spec


@settings(deadline=None, max_examples=100)
@given(st.binary(max_size=200))
def test_garbage_is_refused_and_nothing_else_happens(garbage: bytes) -> None:
    with pytest.raises(SpecInvalid):
        EmbeddedSpec.from_bytes(garbage)


@settings(deadline=None, max_examples=100)
@given(specs(), st.data())
def test_a_spec_with_one_odd_value_is_refused_or_read_whole(spec: EmbeddedSpec, data: st.DataObject) -> None:
    body = msgpack.unpackb(spec.to_bytes())
    key = data.draw(st.sampled_from(sorted(body)))
    body[key] = data.draw(
        st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=5) | st.just([1]) | st.floats()
    )
    try:
        read = EmbeddedSpec.from_bytes(msgpack.packb(body))
    except SpecInvalid:
        return
    assert msgpack.unpackb(read.to_bytes()) == body


def test_the_wire_form_is_what_it_was(make_spec: SpecMaker) -> None:
    assert make_spec(disk_path="/shared/disk.img", max_instructions=1000).to_bytes() == GOLDEN.read_bytes()


def test_a_spec_of_another_version_is_refused(make_spec: SpecMaker) -> None:
    body = msgpack.unpackb(make_spec().to_bytes()) | {"version": 2}
    with pytest.raises(SpecInvalid, match="update the agents"):
        EmbeddedSpec.from_bytes(msgpack.packb(body))


def test_a_spec_longer_than_the_limit_is_not_parsed(make_spec: SpecMaker) -> None:
    wire = make_spec(disk_path="/" + "d" * 4094).to_bytes()
    assert EmbeddedSpec.from_bytes(wire).disk_path == "/" + "d" * 4094
    with pytest.raises(SpecInvalid, match=f"{MAX_SPEC_BYTES + 1} bytes"):
        EmbeddedSpec.from_bytes(wire + bytes(MAX_SPEC_BYTES + 1 - len(wire)))


@pytest.mark.parametrize(
    ("key", "good", "bad"),
    [
        ("ram_bytes", MIN_RAM_BYTES, MIN_RAM_BYTES - PAGE_BYTES),
        ("ram_bytes", MAX_RAM_BYTES, MAX_RAM_BYTES + PAGE_BYTES),
        ("ram_bytes", (2 << 20) + PAGE_BYTES, (2 << 20) + 1),
        ("working_set_bytes", (2 << 20) - FIRST_FREE_BYTE, (2 << 20) - FIRST_FREE_BYTE + PAGE_BYTES),
        ("working_set_bytes", PAGE_BYTES, 0),
        ("fill_bytes", (2 << 20) - FIRST_FREE_BYTE, (2 << 20)),
        ("dirty_bytes_per_s", PAGE_BYTES, PAGE_BYTES - 1),
        ("dirty_bytes_per_s", MAX_DIRTY_BYTES_PER_S, MAX_DIRTY_BYTES_PER_S + 1),
        ("seed", 2**64 - 1, 2**64),
        ("max_instructions", 1, 0),
        ("name", "a" * 63, "a" * 64),
        ("name", "a.b", "../b"),
        ("disk_path", "/" + "d" * 4094, "/" + "d" * 4095),
        ("disk_path", "/d", "d"),
        ("disk_path", "/d", "/d\0"),
        ("disk_path", "/d", "/\ud800"),
        ("cpu_model", "EPYC-Rome", "EPYC-Genoa"),
        ("guest_id", GUEST_ID, GUEST_ID.upper()),
        ("guest_id", GUEST_ID, "../../etc/passwd"),
        ("seed", 0, True),
    ],
)
def test_each_limit_holds_on_both_sides(make_spec: SpecMaker, key: str, good: object, bad: object) -> None:
    changes = {"working_set_bytes": PAGE_BYTES, "fill_bytes": 0}
    make_spec(**changes | {key: good})
    with pytest.raises(SpecInvalid) as caught:
        make_spec(**changes | {key: bad})
    assert [problem.split(":")[0] for problem in caught.value.problems] == [key]


def test_an_idle_guest_needs_no_rate(make_spec: SpecMaker) -> None:
    assert make_spec(pattern=Pattern.IDLE, dirty_bytes_per_s=0).dirty_bytes_per_s == 0


def test_every_mistake_is_told_at_once(make_spec: SpecMaker) -> None:
    with pytest.raises(SpecInvalid) as caught:
        make_spec(name="", cpu_model="Z80", ram_bytes=5, content="salad")
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        "name",
        "cpu_model",
        "content",
        "ram_bytes",
    ]


def test_a_file_is_read_with_units_and_defaults(tmp_path: Path) -> None:
    file = tmp_path / "web.toml"
    file.write_text('ram = "64MiB"\ndirty_rate = "20MiB/s"\nfill = "32MiB"\npattern = "random"\nseed = 7\n')
    spec = EmbeddedSpec.from_toml(file)
    assert (spec.name, spec.ram_bytes, spec.working_set_bytes) == ("web", 64 << 20, 16 << 20)
    assert (spec.fill_bytes, spec.dirty_bytes_per_s, spec.pattern, spec.seed) == (
        32 << 20,
        20 << 20,
        Pattern.RANDOM,
        7,
    )


def test_two_files_without_id_give_two_guests(tmp_path: Path) -> None:
    file = tmp_path / "web.toml"
    file.write_text('ram = "64MiB"\n')
    assert EmbeddedSpec.from_toml(file).guest_id != EmbeddedSpec.from_toml(file).guest_id


def test_a_file_s_mistakes_are_told_by_its_own_keys(tmp_path: Path) -> None:
    file = tmp_path / "web.toml"
    file.write_text(
        'ram = "much"\ndirty_rate = "fast"\ncpu = "Z80"\ncolour = "blue"\nworking_set = "1GiB"\nfill = 1\n'
    )
    with pytest.raises(SpecInvalid) as caught:
        EmbeddedSpec.from_toml(file)
    assert sorted(problem.split(":")[0] for problem in caught.value.problems) == [
        "colour",
        "cpu",
        "dirty_rate",
        "fill",
        "ram",
    ]


@pytest.mark.parametrize("text", ["ram = ", "", "ram = [1]", "\xff"])
def test_a_broken_file_raises_only_spec_invalid(tmp_path: Path, text: str) -> None:
    file = tmp_path / "web.toml"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(SpecInvalid):
        EmbeddedSpec.from_toml(file)


def test_a_missing_file_is_told_by_name(tmp_path: Path) -> None:
    with pytest.raises(SpecInvalid, match=r"none\.toml cannot be read"):
        EmbeddedSpec.from_toml(tmp_path / "none.toml")


def test_the_numbers_of_the_cpu_models_are_unicorn_s() -> None:
    for name, number in spec_module.CPU_MODELS.items():
        constant = "UC_CPU_X86_" + name.upper().replace("-", "_")
        assert getattr(x86_const, constant) == number
