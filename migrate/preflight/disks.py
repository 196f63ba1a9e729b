"""One disk with all that both ends have said of it, for the areas that judge disks."""

from __future__ import annotations

from dataclasses import dataclass

from migrate.facts import DiskFacts, DiskKind, ImageFacts
from migrate.preflight.evidence import Inspection, Probe, Reading

__all__ = ["Disk", "disks_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """A disk, what was planted for it, and what was read: at the source before and after, at the destination between.

    What nobody said is an `ImageFacts` with an error.
    """

    facts: DiskFacts
    probe: Probe | None
    nonce: bytes | None
    reading: Reading | None
    before: Reading | None
    after: Reading | None
    destination: str

    def __str__(self) -> str:
        return f"disk {self.facts.name} ({self.facts.path or 'empty'})"

    @property
    def is_somewhere(self) -> bool:
        """Whether there is something to be looked at: on a host, or behind a URL."""
        return self.facts.kind is not DiskKind.EMPTY and bool(self.facts.path)

    @property
    def is_remote(self) -> bool:
        """Whether its hosts reach it over the network by a URL, with no file and no device of theirs between."""
        return self.facts.kind is DiskKind.NETWORK

    @property
    def is_harmless(self) -> bool:
        """Whether the guest only reads it."""
        return self.facts.is_read_only or self.facts.kind is DiskKind.CDROM

    @property
    def here(self) -> ImageFacts:
        return _image(self.before, "the source did not look at it")

    @property
    def here_after(self) -> ImageFacts:
        return _image(self.after, "the source did not look at it again")

    @property
    def there(self) -> ImageFacts:
        return _image(self.reading, f"{self.destination} did not look at it")

    @property
    def is_on_one_machine(self) -> bool:
        """Whether both ends are containers or processes of one kernel, with one cache of every file."""
        return bool(self.here.kernel) and self.here.kernel == self.there.kernel


def disks_of(inspection: Inspection) -> tuple[Disk, ...]:
    """Put together what belongs to each disk. A name that a peer gives twice counts once."""
    probes = {probe.disk: probe for probe in inspection.probes}
    readings = {reading.disk: reading for reading in inspection.readings}
    before = {reading.disk: reading for reading in inspection.before}
    after = {reading.disk: reading for reading in inspection.after}
    return tuple(
        Disk(
            facts=facts,
            probe=probes.get(facts.name),
            nonce=inspection.nonces.get(facts.name),
            reading=readings.get(facts.name),
            before=before.get(facts.name),
            after=after.get(facts.name),
            destination=inspection.host.name,
        )
        for facts in inspection.guest.disks
    )


def _image(reading: Reading | None, otherwise: str) -> ImageFacts:
    if reading is None or reading.image is None:
        return ImageFacts(error=otherwise)
    return reading.image
