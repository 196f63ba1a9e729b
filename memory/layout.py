"""The layout of a guest's RAM: its blocks, one after another, as one space of pages numbered from 0.

Law: pure values. A layout may come from a peer, so `Layout.of_sizes` checks everything and has limits.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

from memory.errors import LayoutMismatch

__all__ = ["MAX_BLOCKS", "MAX_NAME_BYTES", "MAX_TOTAL_PAGES", "PAGE_BYTES", "Layout", "RamBlock"]

PAGE_BYTES = 4096
# QEMU's x86 machines take 256 memory slots; a few blocks per slot and firmware are far below this.
MAX_BLOCKS = 1024
# QEMU's names of RAM blocks are at most 255 bytes, because their length is one byte of its stream.
MAX_NAME_BYTES = 255
# 4 TiB of RAM. A page costs an agent 10 bytes of tables (8 digest, 1 dirty, 1 present), so a hostile layout
# can ask for 10 GiB, and less where the free-memory check comes first.
MAX_TOTAL_PAGES = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class RamBlock:
    """One block of RAM: `pages` pages from `first_gfn` on."""

    name: str
    first_gfn: int
    pages: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """All blocks in order of gfn, without gaps. Made by `of_sizes`."""

    blocks: tuple[RamBlock, ...]

    @classmethod
    def of_sizes(cls, sizes: list[tuple[str, int]]) -> Layout:
        """Lay blocks of (name, size in bytes) one after another.

        Raises:
            LayoutMismatch: theirs: no block, too many or too much, a name twice or unusable, or a size that is
                not a positive multiple of the page size.
        """
        if not 1 <= len(sizes) <= MAX_BLOCKS:
            raise LayoutMismatch(f"a guest has 1 to {MAX_BLOCKS} blocks of RAM, not {len(sizes)}")
        blocks: list[RamBlock] = []
        seen: set[str] = set()
        next_gfn = 0
        for name, size_bytes in sizes:
            if not 1 <= len(name.encode("utf-8", "surrogatepass")) <= MAX_NAME_BYTES:
                raise LayoutMismatch(f"a block's name has 1 to {MAX_NAME_BYTES} bytes: {name[:40]!r}")
            if name in seen:
                raise LayoutMismatch(f"two blocks of RAM are named {name!r}")
            if size_bytes <= 0 or size_bytes % PAGE_BYTES:
                raise LayoutMismatch(
                    f"block {name!r} has {size_bytes} bytes: not whole pages of {PAGE_BYTES}"
                )
            seen.add(name)
            blocks.append(RamBlock(name=name, first_gfn=next_gfn, pages=size_bytes // PAGE_BYTES))
            next_gfn += size_bytes // PAGE_BYTES
        if next_gfn > MAX_TOTAL_PAGES:
            raise LayoutMismatch(f"{next_gfn} pages of RAM are more than the {MAX_TOTAL_PAGES} we can move")
        return cls(blocks=tuple(blocks))

    @property
    def total_pages(self) -> int:
        return sum(block.pages for block in self.blocks)

    @property
    def total_bytes(self) -> int:
        return self.total_pages * PAGE_BYTES

    def fingerprint(self) -> bytes:
        """Give 16 bytes that are equal exactly for equal layouts: names, sizes and order."""
        digest = hashlib.blake2b(digest_size=16, person=b"vmferry layout")
        for block in self.blocks:
            name = block.name.encode("utf-8", "surrogatepass")
            digest.update(struct.pack("<HQ", len(name), block.pages))
            digest.update(name)
        return digest.digest()
