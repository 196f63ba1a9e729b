"""The digest that proves two RAMs equal: one keyed 64-bit hash a page, and 16 bytes over all of them.

Law: pure. The source updates it with the very bytes it sends, the destination with what it reads back from
its RAM; equal digests at the stop mean that every page arrived, the newest version of it, at its place.

What it detects: faults. A page that differs goes unseen with probability 2**-64 (xxh3_64, whose seed comes from a key
that both sides have and a guest has not, so a guest cannot prepare pages that collide). The table is position-bound:
two pages that changed places differ in two entries. It is no defence against someone who knows the key: the wire
is sealed, and whoever holds an end of it could put any page there without a collision.

Hashing is a call for each page of a batch, the one exception to the rule of no such loop, and over views of the pages
that are made once for a buffer: 75 µs a MiB, where slicing them each time takes 140 and a hash of it all 35 (2 vCPUs).
xxh3_64 makes 9 GB/s over a whole RAM with slicing, xxh3_128 8.0-8.8, blake2b 0.5-0.8.
Hashes of numpy alone (multilinear sums modulo 2**64: 3-10 GB/s) are no faster and blind: the top bit of a word
reaches only the top bit of the sum, so two flipped top bits cancel out. The total is asked for while the guest
stands still, so it is xxh3_128 over the table too: 0.1 ms per GiB of guest, where blake2b takes 2.4 ms.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

from memory.cursor import RunCursor
from memory.layout import PAGE_BYTES
from memory.runs import Gfns, Runs, expand, fill, pages_in, runs_of_gfns, runs_of_mask

__all__ = [
    "DIGEST_BYTES",
    "GROUP_PAGES",
    "HASH_BYTES",
    "MIN_KEY_BYTES",
    "PageHashes",
    "RamDigest",
    "ScannableRam",
    "page_views",
    "total_of",
]

DIGEST_BYTES = 16
MIN_KEY_BYTES = 16
HASH_BYTES = 8
# Pages under one digest where two RAMs are compared: 16 KiB of digests a GiB, and 2 KiB of hashes where one differs.
GROUP_PAGES = 256
PageHashes = NDArray[np.uint64]

_SCAN_PAGES = 256


class ScannableRam(Protocol):
    """What a full scan needs of a RAM; the engine's GuestRam has it."""

    @property
    def total_pages(self) -> int: ...

    def populated_runs(self) -> Runs: ...

    def gather(self, runs: Runs, out: memoryview) -> int: ...


def page_views(buffer: memoryview) -> tuple[memoryview, ...]:
    """Give a view of each page of a buffer: once for one that is used again and again.

    Raises:
        ValueError: it does not have whole pages.
    """
    octets = buffer.cast("B")
    if octets.nbytes % PAGE_BYTES:
        raise ValueError(f"{octets.nbytes} bytes are no whole pages")
    return tuple(octets[at : at + PAGE_BYTES] for at in range(0, octets.nbytes, PAGE_BYTES))


class RamDigest:
    """The hashes of a guest's pages; of a RAM that is all zero at first.

    Threads may update at once as long as their pages are not the same ones; whoever asks for `total` knows that
    none updates. Takes 8 bytes a page.

    Args:
        key: at least 16 secret bytes, the same at both ends of one migration and of no other.
    """

    def __init__(self, total_pages: int, key: bytes) -> None:
        if len(key) < MIN_KEY_BYTES:
            raise ValueError(f"a digest's key has at least {MIN_KEY_BYTES} bytes, not {len(key)}")
        derived = hashlib.blake2b(key, digest_size=16, person=b"vmferry digest").digest()
        self._seed = int.from_bytes(derived[:8], "little")
        self._total_seed = int.from_bytes(derived[8:], "little")
        self._zero_hash = np.uint64(xxhash.xxh3_64_intdigest(bytes(PAGE_BYTES), self._seed))
        self._hashes: PageHashes = np.full(total_pages, self._zero_hash, dtype=np.uint64)

    @property
    def page_hashes(self) -> PageHashes:
        """The table itself, one entry a page: to be read only."""
        table = self._hashes.view()
        table.flags.writeable = False
        return table

    def update(self, runs: Runs, views: Sequence[memoryview]) -> None:
        """Take `views`, as `page_views` gives them, as the contents of `runs`, in order."""
        if len(views) != pages_in(runs):
            raise ValueError(f"{len(views)} views are not {pages_in(runs)} pages")
        hashes = map(xxhash.xxh3_64_intdigest, views, itertools.repeat(self._seed))
        self._hashes[expand(runs)] = np.fromiter(hashes, dtype=np.uint64, count=len(views))

    def update_zeros(self, runs: Runs) -> None:
        """Take the pages of `runs` as zero; no byte is hashed."""
        fill(self._hashes, runs, self._zero_hash)

    def data_runs(self) -> Runs:
        """Give the pages that are not zero by the digest (0.3 ms per 1 Mi pages, and 0.5 ms per 1000 runs)."""
        return runs_of_mask(self._hashes != self._zero_hash)

    def total(self) -> bytes:
        """Give 16 bytes over all pages: equal at both ends exactly when every page's hash is."""
        return xxhash.xxh3_128_digest(self._hashes.astype("<u8", copy=False).data, self._total_seed)

    @property
    def groups(self) -> int:
        """How many groups of GROUP_PAGES pages there are; the last one may be smaller."""
        return -(-self._hashes.size // GROUP_PAGES)

    def group_digests(self, first: int, count: int) -> bytes:
        """Give 16 bytes for each of `count` groups from `first` on."""
        table = self._hashes.astype("<u8", copy=False)
        return b"".join(
            xxhash.xxh3_128_digest(table[at : at + GROUP_PAGES].data, self._total_seed)
            for at in range(first * GROUP_PAGES, (first + count) * GROUP_PAGES, GROUP_PAGES)
        )

    def hashes_of_groups(self, groups: Sequence[int]) -> bytes:
        """Give the hashes of these groups' pages, 8 bytes each, one group after the other."""
        return self._hashes.astype("<u8", copy=False)[self._gfns_of(groups)].tobytes()

    def differing_in_groups(self, groups: Sequence[int], theirs: bytes) -> Runs:
        """Give the pages of these groups whose hash is another one in `theirs`, what `hashes_of_groups` gave there.

        Raises:
            ValueError: no such groups, not in order, or another number of hashes.
        """
        if any(not 0 <= group < self.groups for group in groups):
            raise ValueError(f"there are groups 0 to {self.groups - 1} only")
        if any(group >= after for group, after in itertools.pairwise(groups)):
            raise ValueError("groups are named in order, each once")
        gfns = self._gfns_of(groups)
        if len(theirs) != gfns.size * HASH_BYTES:
            raise ValueError(f"{len(theirs)} bytes are not the hashes of {gfns.size} pages")
        differ = self._hashes[gfns] != np.frombuffer(theirs, dtype="<u8")
        return runs_of_gfns(gfns[differ])

    def _gfns_of(self, groups: Sequence[int]) -> Gfns:
        firsts = np.array(groups, dtype=np.int64).reshape(-1, 1) * GROUP_PAGES
        gfns = (firsts + np.arange(GROUP_PAGES, dtype=np.int64)).reshape(-1)
        return gfns[gfns < self._hashes.size]

    def scan(self, ram: ScannableRam, runs: Runs) -> None:
        """Take what these pages of a RAM hold now."""
        cursor = RunCursor(runs, _SCAN_PAGES)
        pages = memoryview(bytearray(_SCAN_PAGES * PAGE_BYTES))
        views = page_views(pages)
        while len(part := cursor.take()):
            self.update(part, views[: ram.gather(part, pages) // PAGE_BYTES])

    def differing_pages(self, other: PageHashes) -> Gfns:
        """Give the gfns whose hash is another one in `other`, the `page_hashes` of a digest with the same key."""
        if other.shape != self._hashes.shape:
            raise ValueError(f"digests of {self._hashes.size} and {other.size} pages do not compare")
        return np.flatnonzero(self._hashes != other).astype(np.int64, copy=False)


def total_of(ram: ScannableRam, key: bytes) -> bytes:
    """Give the total of a RAM that nothing writes meanwhile. Reads every page that may differ from zero."""
    digest = RamDigest(ram.total_pages, key)
    digest.scan(ram, ram.populated_runs())
    return digest.total()
