"""What several hosts' hypervisors can give in common: models, features, and which host costs which.

Law: pure. A model that is whatever its host gives (`host`, `max`) is no model in common, whatever it comes to today.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from migrate.cpunames import canonical_all
from migrate.facts import CpuFacts, HostCpuFacts
from migrate.preflight.cpufit import is_host_model
from migrate.preflight.evidence import named

__all__ = [
    "Baseline",
    "Candidate",
    "HostCpus",
    "Lack",
    "Trimmed",
    "Without",
    "baseline",
    "lacks",
    "named_models",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class HostCpus:
    """What one hypervisor of one host can give."""

    host: str
    hypervisor: str
    cpus: tuple[CpuFacts, ...]
    cpu_host: HostCpuFacts = field(default_factory=HostCpuFacts)

    @property
    def features(self) -> frozenset[str]:
        """Everything that it can give to any model."""
        at_all = set(canonical_all(self.cpu_host.features))
        for cpu in self.cpus:
            at_all.update(canonical_all(cpu.features))
        return frozenset(at_all)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A model that a file defines, and the hosts that cannot run it, each with what it lacks."""

    model: str
    features: tuple[str, ...]
    lacking: dict[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trimmed:
    """A model without the features that some host lacks: what all can run of it."""

    model: str
    removed: tuple[str, ...]
    features: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Without:
    """What the others have in common that this host lacks, and the models that would be the largest without it."""

    host: str
    features: tuple[str, ...]
    models: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """`models` are the largest that all hosts run alike: more than one where they have equally many features.

    `trimmed` is a larger one with features taken away, if there is one. `beyond` are features that all hosts have and
    that the largest model does not. `doubts`, a sentence each, are why a guest of it may not move all the same.
    """

    models: tuple[str, ...]
    features: tuple[str, ...]
    beyond: tuple[str, ...]
    trimmed: Trimmed | None
    without: tuple[Without, ...]
    candidates: tuple[Candidate, ...]
    doubts: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lack:
    """What one host lacks of what another of those compared has. `smaller` are models that have more elsewhere."""

    host: str
    features: tuple[str, ...]
    models: tuple[str, ...]
    smaller: tuple[str, ...]


def named_models(offer: HostCpus) -> dict[str, frozenset[str]]:
    """Give the models with fixed features, by name."""
    return {cpu.model: frozenset(canonical_all(cpu.features)) for cpu in offer.cpus if not is_host_model(cpu)}


def lacks(offers: Sequence[HostCpus]) -> tuple[Lack, ...]:
    """Give for each host what it lacks of what any other has."""
    models = {offer.host: named_models(offer) for offer in offers}
    all_features = frozenset[str]().union(*(offer.features for offer in offers))
    most: dict[str, frozenset[str]] = {}
    for known in models.values():
        for name, features in known.items():
            most[name] = most.get(name, frozenset()) | features
    return tuple(
        Lack(
            host=offer.host,
            features=tuple(sorted(all_features - offer.features)),
            models=tuple(sorted(most.keys() - models[offer.host].keys())),
            smaller=tuple(
                sorted(name for name, features in models[offer.host].items() if features != most[name])
            ),
        )
        for offer in offers
    )


def baseline(offers: Sequence[HostCpus], candidates: Iterable[CpuFacts] = ()) -> Baseline:
    """Find the largest model that all hosts run with the same features, and what stands in the way of a larger one."""
    alike, cut = _common(offers)
    models, features = _largest(alike)
    shared = _shared(offers)
    trimmed = max(cut, key=lambda one: (len(one.features), -len(one.removed), one.model), default=None)
    return Baseline(
        models=models,
        features=tuple(sorted(features)),
        beyond=tuple(sorted(shared - features)),
        trimmed=trimmed if trimmed is not None and len(trimmed.features) > len(features) else None,
        without=tuple(_without(offers)) if len(offers) > 1 else (),
        candidates=tuple(
            sorted(
                (_candidate(one, offers) for one in candidates),
                key=lambda one: (-len(one.features), one.model),
            )
        ),
        doubts=tuple(_doubts(offers)),
    )


def _common(offers: Sequence[HostCpus]) -> tuple[dict[str, frozenset[str]], list[Trimmed]]:
    """Split the models that every host has into those that are alike everywhere, and what is common of the others."""
    known = [named_models(offer) for offer in offers]
    alike: dict[str, frozenset[str]] = {}
    cut: list[Trimmed] = []
    for name in sorted(frozenset.intersection(*(frozenset(one) for one in known))) if known else ():
        all_of_it = [one[name] for one in known]
        common, most = frozenset.intersection(*all_of_it), frozenset.union(*all_of_it)
        if not common:
            continue  # such as QEMU's `base`, which is to be filled
        if common == most:
            alike[name] = common
        else:
            cut.append(
                Trimmed(model=name, removed=tuple(sorted(most - common)), features=tuple(sorted(common)))
            )
    return alike, cut


def _largest(models: dict[str, frozenset[str]]) -> tuple[tuple[str, ...], frozenset[str]]:
    """Equally many features may be different ones; then those that all of the largest have."""
    most = max(map(len, models.values()), default=0)
    names = tuple(sorted(name for name, features in models.items() if len(features) == most))
    return names, frozenset.intersection(*(models[name] for name in names)) if names else frozenset()


def _shared(offers: Sequence[HostCpus]) -> frozenset[str]:
    return frozenset.intersection(*(offer.features for offer in offers)) if offers else frozenset()


def _without(offers: Sequence[HostCpus]) -> Iterable[Without]:
    for offer in offers:
        others = [one for one in offers if one is not offer]
        models, _ = _largest(_common(others)[0])
        yield Without(
            host=offer.host, features=tuple(sorted(_shared(others) - offer.features)), models=models
        )


def _doubts(offers: Sequence[HostCpus]) -> Iterable[str]:
    vendors = sorted({one.cpu_host.vendor for one in offers if one.cpu_host.vendor})
    if len(vendors) > 1:
        yield f"the hosts have CPUs of {' and '.join(vendors)}: a guest should not move between makers"
    native = [one.host for one in offers if one.cpu_host.is_native]
    if 0 < len(native) < len(offers):
        emulating = [one.host for one in offers if not one.cpu_host.is_native]
        yield (
            f"guests run on the CPU of {named(native)} and are emulated on {named(emulating)}: "
            "no guest moves between these"
        )
    versions = sorted({one.cpu_host.version for one in offers if one.cpu_host.version})
    if len(versions) > 1:
        yield f"the hypervisors are of versions {', '.join(versions)}, which may define a model differently"


def _candidate(cpu: CpuFacts, offers: Sequence[HostCpus]) -> Candidate:
    wanted = frozenset(canonical_all(cpu.features))
    missing = {offer.host: tuple(sorted(wanted - offer.features)) for offer in offers}
    return Candidate(
        model=cpu.model,
        features=tuple(sorted(wanted)),
        lacking={host: features for host, features in missing.items() if features},
    )
