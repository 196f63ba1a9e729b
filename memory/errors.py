"""What can go wrong with guest RAM.

RamError
├── LayoutMismatch    theirs: a layout that cannot be, or a file that is too small for it
├── CodecError        theirs: a batch that no encoder of ours writes; the stream it came on is dead
├── OutOfRam          the world's: this host has no memory left for the guest
├── RamGone           the world's: the file behind the guest's RAM became shorter
└── TrackerError      the world's: writes cannot be seen; the guest goes on as before
    └── TrackerLost     ... any more: the log has a gap, so every page counts as dirty

Our own mistakes (a buffer too small, a batch too long) are ValueError, and never a peer's doing.
"""

from __future__ import annotations

__all__ = ["CodecError", "LayoutMismatch", "OutOfRam", "RamError", "RamGone", "TrackerError", "TrackerLost"]


class RamError(Exception):
    """Base of this package's errors. `str()` is one sentence with the cause."""


class LayoutMismatch(RamError):
    """The blocks of RAM that were named cannot be, or do not fit what is there."""


class CodecError(RamError):
    """A batch is not what an encoder writes: a broken or hostile peer."""


class OutOfRam(RamError):
    """The host cannot give memory for pages of the guest; the pages written before stay written."""

    def __init__(self, *, first_gfn: int, wanted_bytes: int) -> None:
        super().__init__(first_gfn, wanted_bytes)
        self.first_gfn = first_gfn
        self.wanted_bytes = wanted_bytes

    def __str__(self) -> str:
        return (
            f"no memory left on this host for {self.wanted_bytes} bytes of guest RAM at page {self.first_gfn}; "
            "free some memory, enlarge the file system that holds guest RAM, or choose another host"
        )


class RamGone(RamError):
    """The file behind the RAM ended before the layout does: its owner cut it while we held it."""

    def __init__(self, *, first_gfn: int) -> None:
        super().__init__(first_gfn)
        self.first_gfn = first_gfn

    def __str__(self) -> str:
        return f"the file behind the guest's RAM ends before page {self.first_gfn}: its owner made it shorter"


class TrackerError(RamError):
    """The kernel refuses to log the guest's writes. The guest is as it was before."""


class TrackerLost(TrackerError):
    """The log has a gap: pages may have changed unseen since the last harvest. Everything is dirty."""
