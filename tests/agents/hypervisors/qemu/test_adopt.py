"""Arguments and specs are inverses; what has no place in a spec is named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agents.hypervisors.qemu.adopt import MAX_PROBLEM_CHARS, MAX_PROBLEMS, spec_of
from agents.hypervisors.qemu.cmdline import HostPaths, argv_of
from agents.hypervisors.qemu.errors import NotAdoptable, SpecInvalid
from agents.hypervisors.qemu.spec import (
    Accel,
    Backend,
    Bus,
    Cache,
    DiskSpec,
    Format,
    MemorySpec,
    NetworkKind,
    NetworkSpec,
    QemuSpec,
    Vga,
)
from tests.agents.hypervisors.qemu.conftest import GUEST_ID, PLAIN, RICH

HOST = HostPaths(
    binary=Path("/usr/bin/qemu-system-x86_64"),
    qmp=Path("/run/q/1.qmp"),
    monitor=Path("/run/q/1.mon"),
    console=Path("/run/q/1.con"),
    console_log=Path("/run/q/1.log"),
    pid=Path("/run/q/1.pid"),
)

_PLACES = (
    "/srv/{n}.img",
    "/dev/sd{n}",
    "nbd://[fd00::{n:x}]:1{n}/guest-{n}",
    "nbd://store:1{n}",
    "iscsi://store:1{n}/iqn.2026-01.example:a/{n}",
    "iscsi://[fd00::{n:x}]:3260/iqn.2026-01.example:a/0",
    "nfs://store{n}:2049/guests/a/{n}.img",
    "nfs://[fd00::{n:x}]:2049/guests/a",
    "https://store{n}:443/a/{n}.iso",
    "http://[fd00::{n:x}]:1{n}/a",
)
_disks = st.builds(
    lambda place, n, is_read_only, **more: DiskSpec(
        path=place.format(n=n), is_read_only=is_read_only or place.startswith("http"), **more
    ),
    place=st.sampled_from(_PLACES),
    n=st.integers(0, 999),
    format=st.sampled_from(Format),
    bus=st.sampled_from(Bus),
    cache=st.sampled_from(Cache),
    is_read_only=st.booleans(),
)
_cards = st.builds(
    lambda kind, n: NetworkSpec(
        kind=kind, mac=f"52:54:00:00:00:{n:02x}", interface="" if kind is NetworkKind.USER else f"if{n}"
    ),
    st.sampled_from(NetworkKind),
    st.integers(0, 255),
)
_one_memory = st.builds(
    lambda size, backend, name: (MemorySpec(name=name, size_bytes=size << 20, backend=backend),),
    st.integers(1, 4096),
    st.sampled_from(Backend),
    st.sampled_from(["ram0", "mem", "pc.ram"]),
)
_nodes = st.lists(st.sampled_from([0, 2 << 20]), min_size=1, max_size=4).map(
    lambda pages: tuple(
        MemorySpec(name=f"ram{node}", size_bytes=64 << 20, page_bytes=page_bytes, node=node)
        for node, page_bytes in enumerate(pages)
    )
)


@st.composite
def specs(draw: st.DrawFn) -> QemuSpec:
    has_kernel = draw(st.booleans())
    return QemuSpec(
        guest_id=GUEST_ID,
        name=draw(st.sampled_from(["a", "web-1.example", "Z_9"])),
        machine=draw(st.sampled_from(["pc-q35-7.2", "pc-i440fx-8.0"])),
        accel=draw(st.sampled_from(Accel)),
        cpu=draw(st.sampled_from(["max", "Nehalem", "EPYC,-avx2,+invtsc"])),
        vcpus=draw(st.integers(1, 64)),
        memories=draw(st.one_of(_one_memory, _nodes)),
        disks=tuple(draw(st.lists(_disks, max_size=4, unique_by=lambda disk: disk.path))),
        networks=tuple(draw(st.lists(_cards, max_size=3, unique_by=lambda card: card.mac))),
        kernel="/boot/vmlinuz" if has_kernel else "",
        initrd="/boot/initrd" if has_kernel and draw(st.booleans()) else "",
        append="console=ttyS0 a=b,c" if has_kernel and draw(st.booleans()) else "",
        vga=draw(st.sampled_from(Vga)),
        has_balloon=draw(st.booleans()),
        has_rng=draw(st.booleans()),
    )


@given(specs(), st.booleans())
def test_the_arguments_of_a_spec_are_read_as_that_spec(spec: QemuSpec, is_incoming: bool) -> None:
    assert spec_of(argv_of(spec, HOST, is_incoming=is_incoming)) == spec


def test_an_incoming_machine_waits_stopped_and_a_new_one_does_not() -> None:
    assert argv_of(PLAIN, HOST, is_incoming=True)[-3:] == ["-S", "-incoming", "defer"]
    assert "-incoming" not in argv_of(PLAIN, HOST, is_incoming=False)


def theirs(*more: str) -> list[str]:
    """What a person would write."""
    return [
        *("qemu-system-x86_64", "-name", "web1,debug-threads=on", "-uuid", GUEST_ID, "-enable-kvm"),
        *(
            "-M",
            "pc-q35-7.2,memory-backend=mem,dump-guest-core=off",
            "-cpu",
            "Nehalem",
            "-smp",
            "2",
            "-m",
            "1G",
        ),
        *(
            "-object",
            "memory-backend-memfd,id=mem,size=1G,share=on,prealloc=on",
            "-nodefaults",
            "-display",
            "none",
        ),
        *("-qmp", "unix:/run/q/web1.qmp,server=on,wait=off", "-serial", "file:/var/log/web1", *more),
    ]


def test_a_qemu_that_somebody_else_started_becomes_a_spec() -> None:
    spec = spec_of(
        theirs(
            *(
                "-blockdev",
                "driver=raw,node-name=d0,cache.direct=on,file.driver=file,file.cache.direct=on,"
                "file.filename=/srv/a.raw,file.aio=native",
            ),
            *("-device", "virtio-blk-pci,drive=d0", "-sandbox", "on", "-daemonize"),
            *("-netdev", "tap,id=n0,ifname=tap7,script=no,downscript=no"),
            *("-device", "virtio-net-pci,netdev=n0,mac=52:54:00:00:00:07"),
        )
    )
    assert spec == QemuSpec(
        guest_id=GUEST_ID,
        name="web1",
        machine="pc-q35-7.2",
        accel=Accel.KVM,
        cpu="Nehalem",
        vcpus=2,
        memories=(MemorySpec(name="mem", size_bytes=1 << 30),),
        disks=(DiskSpec(path="/srv/a.raw", format=Format.RAW),),
        networks=(NetworkSpec(kind=NetworkKind.TAP, mac="52:54:00:00:00:07", interface="tap7"),),
    )


def test_a_block_device_below_dev_becomes_a_disk_and_comes_back() -> None:
    disks = (
        DiskSpec(path="/dev/mapper/guest-1", format=Format.RAW),
        DiskSpec(path="/dev/shm/a.raw", format=Format.RAW),
    )
    argv = argv_of(replace(PLAIN, disks=disks), HOST, is_incoming=False)
    drivers = [word.partition("file.driver=")[2].partition(",")[0] for word in argv if "file.driver" in word]
    assert drivers == ["host_device", "file"]
    for path, driver in (("/dev/sdb", "file"), ("/srv/a.raw", "host_device"), ("/srv/a.raw", "ssh")):
        block = f"driver=raw,node-name=d0,file.driver={driver},file.filename={path}"
        with pytest.raises(NotAdoptable, match=r"has no place|have a place"):
            spec_of(theirs("-blockdev", block, "-device", "virtio-blk-pci,drive=d0"))


WITHOUT_PLACE: list[tuple[tuple[str, ...], str]] = [
    (("-usb",), "-usb has no value"),
    (("-device", "vfio-pci,host=01:00.0"), "-device vfio-pci"),
    (("-device", "VGA,vgamem_mb=64"), "vgamem_mb=64"),
    (("-machine", "pc-q35-7.2,memory-backend=mem,vmport=off"), "vmport=off"),
    (("-drive", "file=/srv/a.raw,if=virtio"), "-drive"),
    (("-netdev", "tap,id=n,ifname=t,script=no,vhost=on", "-device", "virtio-net-pci,netdev=n"), "vhost"),
    (
        ("-netdev", "tap,id=n2,ifname=t", "-device", "virtio-net-pci,netdev=n2,mac=52:54:00:00:00:01"),
        "scripts",
    ),
    (("-rtc", "base=localtime"), "-rtc"),
    (("-serial", "none", "-serial", "pty"), "2 -serial"),
    (("-vga", "qxl"), "-vga"),
    (("-smp", "cpus=2,sockets=2"), "sockets=2"),
    (("-display", "gtk"), "-display"),
    (("-numa", "node,nodeid=0,memdev=mem,cpus=0-1"), "cpus=0-1"),
    (("-object", "memory-backend-memfd,id=other,size=1G,share=on"), "other"),
    (("-object", "memory-backend-memfd,id=mem,size=1G"), "share=on"),
    (("-object", "memory-backend-ram,id=mem,size=1G,share=on"), "memory-backend-ram"),
    (("-object", "secret,id=s,data=x"), "secret"),
    (("-blockdev", '{"driver":"raw"}'), "JSON"),
    (("-blockdev", "driver=rbd,node-name=d", "-device", "virtio-blk-pci,drive=d"), "raw and qcow2"),
    *(
        (
            (
                *("-blockdev", f"driver=raw,node-name=n{number},file.driver={place}"),
                *("-device", f"virtio-blk-pci,drive=n{number}"),
            ),
            f"what its {place.partition(',')[0]} driver is told",
        )
        for number, place in enumerate(
            (
                "nbd,file.server.type=unix,file.server.path=/run/nbd",
                "nbd,file.server.type=inet,file.server.host=h,file.server.port=nbd,file.export=a",
                "nbd,file.server.type=inet,file.server.host=h,file.server.port=1,file.export=a b",
                "nbd,file.server.type=inet,file.server.host=h/b,file.server.port=1",
                "nbd,file.server.type=inet,file.server.host=u@h,file.server.port=1",
                "iscsi,file.transport=iser,file.portal=h:1,file.target=iqn.a,file.lun=1",
                "iscsi,file.transport=tcp,file.portal=h,file.target=iqn.a,file.lun=1",
                "iscsi,file.transport=tcp,file.portal=h:1,file.target=iqn.a",
                "nfs,file.server.type=inet,file.server.host=h,file.path=/a",
                "nfs,file.server.type=inet,file.server.host=h,file.path=guests/a",
                "https,file.url=https://user@h:443/a",
                "http,file.url=file:///etc/passwd",
            )
        )
    ),
    (("-device", "virtio-blk-pci,drive=none"), "drive"),
    (("-device", "virtio-balloon-pci"), "free-page-reporting"),
    (("-cpu", "host,migratable=off"), "cpu"),
    (("disk.img",), "disk.img"),
]


@pytest.mark.parametrize(("more", "words"), WITHOUT_PLACE)
def test_what_has_no_place_in_a_spec_is_named(more: tuple[str, ...], words: str) -> None:
    with pytest.raises(NotAdoptable, match=words):
        spec_of(theirs(*more))


def problems_of(argv: list[str]) -> tuple[str, ...]:
    with pytest.raises(NotAdoptable) as caught:
        spec_of(argv)
    return caught.value.problems


# Later ones take the place of earlier ones (-machine, -smp), and one that may have a value takes the next word (-usb).
TOGETHER = [
    (more, words)
    for more, words in WITHOUT_PLACE
    if more[0] not in ("-machine", "-smp", "-serial", "-cpu", "-usb")
    and "id=mem" not in str(more)
    and words != "JSON"
]


@given(st.lists(st.sampled_from(TOGETHER), min_size=1, max_size=8, unique_by=lambda one: one[0]))
def test_one_argument_never_hides_another(chosen: list[tuple[tuple[str, ...], str]]) -> None:
    problems = problems_of(theirs(*(word for more, _ in chosen for word in more)))
    assert len(problems) >= len(chosen)
    for _, words in chosen:
        assert any(words in problem for problem in problems), (words, problems)


def test_each_of_several_devices_has_its_own_sentence() -> None:
    devices = ("vfio-pci,host=01:00.0", "ivshmem-plain,memdev=x", "tpm-tis,tpmdev=t", "usb-tablet")
    problems = problems_of(theirs(*(word for device in devices for word in ("-device", device))))
    assert [problem.split()[1] for problem in problems] == [device.partition(",")[0] for device in devices]


def test_a_device_may_stand_before_what_it_refers_to() -> None:
    card, tap = "virtio-net-pci,netdev=n0,mac=52:54:00:00:00:07", "user,id=n0"
    wanted = spec_of(theirs("-netdev", tap, "-device", card))
    assert spec_of(theirs("-device", card, "-netdev", tap)) == wanted
    assert len(wanted.networks) == 1


def test_a_machine_of_many_mistakes_is_told_all_of_them() -> None:
    problems = problems_of(
        [
            *("qemu-system-x86_64", "-name", "web1", "-M", "q35", "-cpu", "host,migratable=off", "-m", "1G"),
            *("-usb", "-rtc", "base=localtime", "-device", "e1000,mac=52:54:00:00:00:07"),
            *("-drive", "file=/srv/a.raw,if=none,id=d", "-device", "virtio-blk-pci,drive=d,serial=7"),
        ]
    )
    for words in (
        "-usb",
        "-rtc",
        "-device e1000",
        "-drive",
        "serial=7",
        "-nodefaults",
        "0 -serial",
        "-uuid is missing",
        "private to QEMU",
        "machine: 'q35'",
        "cpu: 'host,migratable=off'",
    ):
        assert sum(words in problem for problem in problems) == 1, (words, problems)
    # Its drive is not missing: it was named already.
    assert len(problems) == 11


def test_what_a_lost_argument_would_have_said_is_no_problem_of_its_own() -> None:
    problems = problems_of(
        theirs("-blockdev", '{"driver":"raw","node-name":"d0"}', "-device", "virtio-blk-pci,drive=d0")
    )
    assert len(problems) == 1
    assert "JSON" in problems[0]


def test_problems_are_as_many_and_as_long_as_can_be_read_and_not_more() -> None:
    def with_devices(count: int) -> tuple[str, ...]:
        return problems_of(theirs(*(word for n in range(count) for word in ("-device", f"d{n}"))))

    assert len(with_devices(MAX_PROBLEMS)) == MAX_PROBLEMS
    assert with_devices(MAX_PROBLEMS + 2)[MAX_PROBLEMS:] == ("and 2 more arguments like these",)
    (problem,) = problems_of(theirs("-netdev", "tap,id=n", "-" + "x" * 5000))
    assert len(problem) == MAX_PROBLEM_CHARS
    (problem,) = problems_of(
        theirs("-blockdev", "driver=x,node-name=\udcff\x1b", "-device", "virtio-blk-pci,drive=\udcff\x1b")
    )
    assert problem.isprintable()


@pytest.mark.parametrize("missing", ["-uuid", "-name", "-cpu", "-nodefaults", "-object", "-serial", "-M"])
def test_what_is_missing_is_named(missing: str) -> None:
    argv = theirs()
    at = argv.index(missing)
    del argv[at : at + (1 if missing == "-nodefaults" else 2)]
    with pytest.raises(NotAdoptable):
        spec_of(argv)


def test_devices_in_another_order_would_get_other_addresses() -> None:
    argv = argv_of(RICH, HOST, is_incoming=False)
    rng = argv.index("virtio-rng-pci,rng=rng0")
    argv = argv[:1] + argv[rng - 1 : rng + 1] + argv[1 : rng - 1] + argv[rng + 1 :]
    with pytest.raises(NotAdoptable, match="other PCI addresses"):
        spec_of(argv)


@given(
    st.lists(st.sampled_from([*theirs(), "-x", ",", "a=b", "share=on", "-device", "-object"]), max_size=12)
)
def test_whatever_the_arguments_are_only_its_own_error_comes(argv: list[str]) -> None:
    with pytest.raises((NotAdoptable, SpecInvalid)):
        spec_of(["qemu", *argv])
