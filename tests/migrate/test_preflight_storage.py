"""The checks of disks: each answer to each, from facts alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migrate.facts import BackingFacts, DiskFacts, DiskKind, ImageFacts
from migrate.preflight import Finding, Inspection, LockAnswer, Probe, Reading, Severity, examine
from migrate.preflight.images import DIRECTORY_POOLS, LOCAL_POOLS, LOW_BYTES, NETWORKED_POOLS
from migrate.preflight.sharing import CLUSTERED
from tests.migrate.test_preflight import GOOD, READ
from tests.migrate.world import DISK, IMAGE

MIB = 1 << 20


def seen(
    here: ImageFacts = IMAGE,
    there: ImageFacts = IMAGE,
    after: ImageFacts | None = None,
    disk: DiskFacts = DISK,
    **reading: object,
) -> Inspection:
    """A pair that is good but for what the two ends see of the disk."""
    return replace(
        GOOD,
        guest=replace(GOOD.guest, disks=(disk,)),
        before=(replace(READ, echo=b"", image=here),),
        readings=(replace(READ, image=there, **reading),),  # type: ignore[arg-type]
        after=(replace(READ, image=after or here),),
    )


def of(check: str, inspection: Inspection) -> Finding:
    (finding,) = [one for one in examine(inspection).findings if one.check == check]
    return finding


def others(inspection: Inspection) -> set[tuple[str, str]]:
    """What is not `ok`."""
    return {
        (one.check, str(one.severity))
        for one in examine(inspection).findings
        if one.severity is not Severity.OK
    }


def image(**changed: object) -> ImageFacts:
    return replace(IMAGE, **changed)  # type: ignore[arg-type]


def disk(**changed: object) -> DiskFacts:
    return replace(DISK, **changed)  # type: ignore[arg-type]


def remote(here: ImageFacts, there: ImageFacts) -> Inspection:
    """A disk behind a URL: nothing can be written beside it, and no host has a file system or a lock of it."""
    facts = disk(kind=DiskKind.NETWORK, path="nbd://store1:10809/guest-1", cache="none", is_locked=False)
    probes = (replace(GOOD.probes[0], path="", is_locked=False),)
    return replace(seen(here, there, disk=facts, content=None, echo=b""), nonces={}, probes=probes)


def export(at: str = "nbd://10.0.0.5:10809/guest-1", **changed: object) -> ImageFacts:
    return image(**({"identity": at, "file_system": "", "kernel": "a"} | changed))


# ---------------------------------------------------------------------- the same object


def test_a_network_disk_is_told_by_where_its_name_leads_to() -> None:
    assert others(remote(export(), export(kernel="b"))) == set()
    elsewhere = export("nbd://10.0.9.9:10809/guest-1", kernel="b")
    assert others(remote(export(), elsewhere)) == {("storage", "warning")}
    assert others(remote(export(), replace(elsewhere, digests=(b"other", b"last")))) == {
        ("storage", "warning"),
        ("disk-content", "refused"),
    }


@pytest.mark.parametrize("at", ["nbd://127.0.0.1:10809/guest-1", "nbd://[::1]:10809/guest-1"])
def test_a_server_that_is_each_host_itself_is_two_unless_they_are_one_machine(at: str) -> None:
    assert others(remote(export(at), export(at))) == set()
    assert others(remote(export(at), export(at, kernel="b"))) == {("storage", "refused")}


def test_a_network_disk_that_one_host_cannot_reach_or_write_is_refused() -> None:
    gone = ImageFacts(error="Connection refused", kernel="b")
    found = of("storage", remote(export(), gone))
    assert (found.severity, "network_disks" in found.remedy) == (Severity.REFUSED, True)
    assert "Connection refused" in found.found
    locked = export(kernel="b", write_error="Permission denied")
    assert others(remote(export(), locked)) == {("disk-access", "refused")}


def test_a_nonce_counts_in_both_directions() -> None:
    assert others(seen(echo=b"", echo_error="Read-only file system")) == {("storage", "refused")}
    assert others(seen(echo=b"other")) == {("storage", "refused")}
    assert others(seen(content=b"other")) == {("storage", "refused")}
    assert others(replace(seen(), after=(replace(READ, echo=b""),))) == {("storage", "refused")}


def test_a_file_of_another_name_or_under_a_mount_of_its_own_is_another() -> None:
    assert others(seen(there=image(name="copy.img"))) == {("storage", "refused")}
    assert others(seen(here=image(is_covered=True))) == {("storage", "refused")}
    assert others(seen(there=image(is_covered=True))) == {("storage", "refused")}


def test_only_sectors_that_stood_still_are_compared() -> None:
    first, both = image(digests=(b"new", b"last")), image(digests=(b"new", b"new"))
    assert others(seen(there=first)) == {("disk-content", "refused")}
    assert others(seen(there=first, after=first)) == set()
    assert others(seen(there=both, after=both)) == {("disk-content", "unknown")}
    # An end that could not read, or read something else than it was asked to.
    assert others(seen(there=image(digests=(b"", b"last")))) == {("disk-content", "refused")}
    assert others(seen(there=image(digests=(b"first",)))) == {("disk-content", "refused")}


def test_an_image_may_grow_meanwhile_and_have_no_other_size() -> None:
    size = IMAGE.size_bytes
    assert others(seen(there=image(size_bytes=size + 1), after=image(size_bytes=size + 2))) == set()
    assert others(seen(there=image(size_bytes=size + 1))) == {("disk-content", "refused")}
    assert others(seen(there=image(size_bytes=size - 1))) == {("disk-content", "refused")}


def test_a_read_only_disk_beside_which_nothing_can_be_written_is_proved_by_its_content() -> None:
    bare = replace(
        seen(disk=disk(is_read_only=True), content=None, echo=b""),
        nonces={},
        probes=(replace(GOOD.probes[0], path="", is_locked=False, error="Read-only file system"),),
    )
    assert others(bare) == {("storage", "warning")}
    assert others(replace(bare, guest=GOOD.guest)) == {("storage", "refused"), ("disk-lock", "warning")}


def device(**changed: object) -> ImageFacts:
    facts: dict[str, object] = {
        "is_block": True,
        "device": "8:0",
        "kernel": "a",
        "identity": "wwid:1",
        "file_system": "",
    }
    return image(**(facts | changed))


def block(here: ImageFacts, there: ImageFacts) -> Inspection:
    probes = (replace(GOOD.probes[0], path="", is_locked=False),)
    return replace(seen(here, there, content=None, echo=b""), nonces={}, probes=probes)


def test_a_block_device_is_told_by_what_it_says_of_itself() -> None:
    assert others(block(device(), device(kernel="b", device="8:16"))) == set()
    for other in (
        device(kernel="b", identity="wwid:2"),
        device(kernel="b", identity=""),
        image(kernel="b"),
        device(device="8:16"),
    ):
        assert others(block(device(), other)) == {("storage", "refused")}
    loop = device(identity="loop:/srv/a")
    assert others(block(loop, replace(loop, kernel="b"))) == {("storage", "refused")}
    assert others(block(loop, loop)) == set()


def test_empty_drives_are_nothing_to_be_proved() -> None:
    bare = replace(GOOD, readings=(), before=(), after=(), probes=(), nonces={})
    for facts in (disk(kind=DiskKind.EMPTY, path=""), disk(kind=DiskKind.CDROM, path="", is_read_only=True)):
        assert others(replace(bare, guest=replace(GOOD.guest, disks=(facts,)))) == set()


def test_a_guest_without_disks_has_nothing_to_prove() -> None:
    assert (
        others(replace(GOOD, guest=replace(GOOD.guest, disks=()), readings=(), probes=(), nonces={})) == set()
    )


# ---------------------------------------------------------------------- sharing


def test_locks_that_do_not_hold_across_hosts_are_warned_of() -> None:
    assert others(seen(lock=LockAnswer.GRANTED)) == {("disk-lock", "warning")}
    assert others(seen(lock=LockAnswer.UNTRIED, lock_error="No locks available")) == {
        ("disk-lock", "warning")
    }
    assert "No locks" in of("disk-lock", seen(lock=LockAnswer.UNTRIED, lock_error="No locks")).found


def test_the_guests_own_lock_counts_on_one_machine_only() -> None:
    there, locked = image(writers=1), disk(is_locked=True)
    assert others(seen(there=there, disk=locked)) == {("disk-in-use", "refused")}
    one = image(kernel="a")
    assert others(seen(one, replace(one, writers=1), disk=locked)) == set()
    assert others(seen(one, replace(one, writers=2), disk=locked)) == {("disk-in-use", "refused")}


@pytest.mark.parametrize("cache", ["writeback", "writethrough", "unsafe", "nonsense"])
def test_a_host_may_cache_a_disk_only_on_a_cluster_file_system(cache: str) -> None:
    facts = disk(cache=cache)
    assert others(seen(disk=facts)) == {("disk-cache", "refused")}
    for kind in CLUSTERED:
        assert others(seen(image(file_system=kind), image(file_system=kind), disk=facts)) == set()
        assert others(seen(image(file_system=kind), disk=facts)) == {("disk-cache", "refused")}
    assert others(seen(disk=replace(facts, is_read_only=True))) == set()


def test_a_disk_without_cache_needs_a_file_system_that_can_do_without() -> None:
    assert others(seen(there=image(is_direct=False))) == {("disk-cache", "refused")}
    assert others(seen(disk=disk(cache="directsync"))) == set()
    assert others(seen(disk=disk(cache=""))) == {("disk-cache", "unknown")}
    one = image(kernel="a")
    assert others(seen(one, one, disk=disk(cache=""))) == set()


def test_a_file_system_of_one_host_is_warned_of_unless_both_ends_are_that_host() -> None:
    local = image(file_system="ext4")
    assert others(seen(local, local)) == {("disk-filesystem", "warning")}
    assert others(seen(there=local)) == {("disk-filesystem", "warning")}
    assert others(seen(replace(local, kernel="a"), replace(local, kernel="a"))) == set()
    assert others(seen(there=image(file_system=""))) == {("disk-filesystem", "unknown")}


# ---------------------------------------------------------------------- images


def test_a_disk_that_cannot_be_written_there_is_refused() -> None:
    assert others(seen(there=image(is_read_only=True))) == {("disk-access", "refused")}
    assert others(seen(there=image(write_error="Permission denied"))) == {("disk-access", "refused")}
    assert others(seen(there=image(is_read_only=True), disk=disk(is_read_only=True))) == set()


def test_a_format_that_differs_is_refused_and_one_that_a_guest_may_have_written_warned_of() -> None:
    found = image(format="qcow2")
    assert others(seen(found, found)) == {("disk-format", "warning")}
    assert others(seen(there=found)) == {("disk-format", "refused")}
    assert others(seen(disk=disk(format="qcow2"))) == {("disk-format", "refused")}
    assert others(seen(disk=disk(format=""))) == {("disk-format", "unknown")}
    with_snapshots = image(format="qcow2", snapshots=3)
    assert (
        "3 internal snapshots"
        in of("disk-format", seen(with_snapshots, with_snapshots, disk=disk(format="qcow2"))).found
    )


def test_every_image_under_a_disk_is_the_same_on_both_hosts() -> None:
    facts, base = (
        disk(format="qcow2"),
        BackingFacts(path="/shared/b", size_bytes=1, format="raw", digest=b"1"),
    )
    good = image(format="qcow2", chain=(base,))
    assert others(seen(good, good, disk=facts)) == set()
    for chain, error in (
        ((), ""),
        ((base, base), ""),
        ((replace(base, path="/shared/c"),), ""),
        ((replace(base, digest=b"2"),), ""),
        ((replace(base, size_bytes=2),), ""),
        ((replace(base, error="No such file"),), ""),
        ((base,), "its qcow2 header is cut"),
    ):
        other = replace(good, chain=chain, chain_error=error)
        assert others(seen(good, other, disk=facts)) == {("backing-chain", "refused")}
        assert others(seen(other, good, disk=facts)) == {("backing-chain", "refused")}


def test_room_is_asked_for_what_a_disk_may_still_grow_by() -> None:
    thin = {"allocated_bytes": 0, "virtual_bytes": 4 * LOW_BYTES}
    assert others(seen(there=image(**thin, free_bytes=4 * LOW_BYTES))) == set()
    for free in (4 * LOW_BYTES - 1, LOW_BYTES, LOW_BYTES - 1, 0):
        assert others(seen(there=image(**thin, free_bytes=free))) == {("disk-space", "warning")}
    assert "promised" in of("disk-space", seen(there=image(**thin, free_bytes=LOW_BYTES))).found
    # One that has all its blocks grows no more.
    assert others(seen(there=image(free_bytes=0))) == set()


def test_local_pools_are_refused_and_networked_ones_proved_like_any_disk() -> None:
    for pool in LOCAL_POOLS:
        for ends in (
            (image(pool=pool), image(pool=pool)),
            (image(pool=pool), IMAGE),
            (IMAGE, image(pool=pool)),
        ):
            finding = of("disk-pool", seen(*ends, content=b"other"))
            assert finding.severity is Severity.REFUSED
            assert "local storage pools do not support live migration" in finding.found
    for pool in NETWORKED_POOLS:
        assert others(seen(image(pool=pool), image(pool=pool))) == set()
        # Its word is no proof.
        assert others(seen(image(pool=pool), image(pool=pool), content=b"other")) == {("storage", "refused")}
    assert others(seen(image(pool="of the future"))) == {("disk-pool", "warning")}


def test_a_pool_that_may_be_local_is_no_refusal_where_both_have_shown_one_object() -> None:
    # What is mounted at a directory may be everybody's.
    for pool in DIRECTORY_POOLS:
        assert others(seen(image(pool=pool), image(pool=pool))) == set()
    # Volumes of a volume group on a shared device are the same there; who changes the group is nobody's rule.
    for pool in LOCAL_POOLS - DIRECTORY_POOLS:
        assert others(seen(image(pool=pool), image(pool=pool))) == {("disk-pool", "warning")}


def test_a_libvirt_that_does_not_answer_is_named_with_its_host() -> None:
    for ends, name in (
        ((image(pool_error="no answer"), IMAGE), "host-a"),
        ((IMAGE, image(pool_error="no answer")), "host-b"),
    ):
        finding = of("disk-pool", seen(*ends))
        assert finding.severity is Severity.UNKNOWN
        assert finding.found.startswith(f"{name} cannot tell")
        assert f"Start libvirt on {name}" in finding.remedy


def test_one_bad_disk_of_two_is_found_and_the_other_is_not_blamed() -> None:
    second = disk(name="disk1", path="/shared/other.img")
    inspection = replace(GOOD, guest=replace(GOOD.guest, disks=(DISK, second)))
    refused = examine(inspection).of(Severity.REFUSED)
    assert {one.check for one in refused} == {"storage", "disk-content", "disk-access"}
    assert all("disk1" in one.found for one in refused)


# ---------------------------------------------------------------------- nonsense

WORDS = st.text(max_size=8) | st.sampled_from(["qcow2", "raw", "ext4", "gfs2", "loop:x", "/"])
SIZES = st.integers(-(1 << 63), (1 << 64) - 1)
IMAGES = st.builds(
    ImageFacts,
    error=st.just("") | WORDS,
    name=WORDS,
    is_block=st.booleans(),
    is_covered=st.booleans(),
    kernel=WORDS,
    device=WORDS,
    identity=WORDS,
    size_bytes=SIZES,
    allocated_bytes=SIZES,
    virtual_bytes=SIZES,
    digests=st.lists(st.binary(max_size=4), max_size=3).map(tuple),
    is_direct=st.booleans(),
    write_error=WORDS,
    writers=SIZES,
    file_system=WORDS,
    free_bytes=SIZES,
    is_read_only=st.booleans(),
    format=WORDS,
    snapshots=SIZES,
    chain=st.lists(st.builds(BackingFacts, path=WORDS, error=WORDS, size_bytes=SIZES), max_size=3).map(tuple),
    chain_error=WORDS,
    pool=st.just("") | WORDS | st.sampled_from(sorted(LOCAL_POOLS)),
    pool_error=st.just("") | WORDS,
)
READINGS = st.builds(
    Reading,
    disk=st.just(DISK.name) | WORDS,
    content=st.none() | st.binary(max_size=4),
    error=st.none() | WORDS,
    image=st.none() | IMAGES,
    echo=st.binary(max_size=4),
    echo_error=WORDS,
    lock=st.sampled_from(LockAnswer),
    lock_error=WORDS,
)
DISKS = st.builds(
    DiskFacts,
    name=st.just(DISK.name) | WORDS,
    path=WORDS,
    size_bytes=SIZES,
    is_read_only=st.booleans(),
    kind=st.sampled_from(DiskKind),
    format=WORDS,
    cache=WORDS,
    is_locked=st.booleans(),
)


@settings(max_examples=200, deadline=None)
@given(
    disks=st.lists(DISKS, max_size=3),
    readings=st.lists(READINGS, max_size=3),
    before=st.lists(READINGS, max_size=2),
    offsets=st.lists(SIZES, max_size=3),
)
def test_no_facts_crash_a_check_and_none_of_a_destination_proves_a_disk_that_the_source_did_not_read(
    disks: list[DiskFacts], readings: list[Reading], before: list[Reading], offsets: list[int]
) -> None:
    inspection = replace(
        GOOD,
        guest=replace(GOOD.guest, disks=tuple(disks)),
        probes=(Probe(disk=DISK.name, path="/p", image="/x", offsets=tuple(offsets)),),
        readings=tuple(readings),
        before=tuple(before),
        after=(),
    )
    report = examine(inspection)
    if any(one.kind is DiskKind.FILE and one.path for one in disks):
        assert not report.is_passed
