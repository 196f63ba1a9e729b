"""`vmferry cpu`: what CPU models hosts can give, what they lack of each other, and the largest that all can run.

Law: decides nothing; `migrate.cpubaseline` does. Files of models are read here, on the operator's machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, Final

import anyio
import click

from agents.cli import options
from agents.cli.options import HOST, config_option
from agents.cli.output import Exit, escaped, json_option, print_facts, print_json, print_table
from agents.client import Fleet
from agents.errors import SettingsError
from migrate.cpubaseline import Baseline, HostCpus, baseline, lacks, named_models
from migrate.cpudomain import read_domain_cpu
from migrate.cpufiles import MAX_FILE_BYTES, CpuFileInvalid, read_cpu_files
from migrate.cpunames import canonical_all
from migrate.facts import CpuFacts
from migrate.preflight.cpufit import is_host_model

__all__ = ["cpu"]

# Of a folder: libvirt's map has 80 files.
_MAX_FILES: Final = 500
# Guests of this hypervisor are what models are chosen for; the embedded one's are a test's.
_PREFERRED: Final = "qemu"

_hypervisor_option = click.option(
    "--hypervisor",
    help="The hypervisor whose models are meant.  [default: qemu, or the one that all hosts have]",
)
_file_option = click.option(
    "--file",
    "files",
    multiple=True,
    type=click.Path(path_type=Path, exists=True),
    help="A file of models: libvirt's CPU map (XML), a RHEL 6 [cpudef] file, or a folder of them. May be repeated.",
)


@click.group(
    epilog="""\
\b
Examples:
  vmferry cpu show host-a
  vmferry cpu compare host-a host-b
  vmferry cpu baseline host-a host-b host-c
"""
)
def cpu() -> None:
    """Show and compare the CPU models of hosts, and find the largest that all of them can run.

    Models are what each host's hypervisor really gives: without the features that the host lacks.
    """


@cpu.command(
    epilog="""\
\b
Examples:
  vmferry cpu show host-a
  vmferry cpu show host-a --model Haswell
  vmferry cpu show --file /usr/share/libvirt/cpu_map
  vmferry cpu show host-a --json | jq -r '.models[] | select(.features | index("avx2")) | .model'
"""
)
@click.argument("host", required=False, type=HOST)
@click.option("--model", help="Show every feature of this model.")
@_file_option
@_hypervisor_option
@config_option
@json_option
def show(
    host: str | None,
    model: str | None,
    files: tuple[Path, ...],
    hypervisor: str | None,
    config: Path | None,
    as_json: bool,
) -> int:
    """Show the CPU models of HOST, or of files, with their numbers of features."""
    if (host is None) == (not files):
        raise click.UsageError("give a host, or --file")
    head: dict[str, object] = {}
    whole = ""
    if host is None:
        models = _read_files(files)
    else:
        (offer,) = _ask(config, [host], hypervisor)
        models, whole = offer.cpus, _whole(offer)
        head = {"host": offer.host, "hypervisor": offer.hypervisor, "cpu": offer.cpu_host}
    if model is not None:
        found = next((one for one in models if one.model == model), None)
        if found is None:
            raise click.BadParameter(
                f"there is no model {model}: `vmferry cpu show` without --model lists them"
            )
        if as_json:
            print_json({**head, "models": [found]})
        else:
            print_facts(_facts(found))
        return Exit.OK
    if as_json:
        print_json({**head, "models": models})
        return Exit.OK
    rows = [
        (
            one.model,
            one.vendor or "-",
            _numbers(one),
            len(one.features),
            "host" if is_host_model(one) else "fixed",
        )
        for one in models
    ]
    print_table(["MODEL", "VENDOR", "FAMILY/MODEL", ">FEATURES", "KIND"], rows, empty="no models")
    if whole:
        click.echo(escaped(whole))
    return Exit.OK


@cpu.command(
    epilog="""\
\b
Examples:
  vmferry cpu compare host-a host-b host-c
  vmferry cpu compare host-b host-c --guest web1
  virsh dumpxml web2 | vmferry cpu compare host-b host-c --domain -
  vmferry cpu compare host-a host-b --json | jq '.hosts[] | {host, features}'
"""
)
@click.argument("hosts", nargs=-1, required=True, type=HOST)
@click.option("--guest", help="Compare the hosts with this guest's CPU.")
@click.option(
    "--domain",
    type=click.File("rb"),
    help="Compare them with the CPU of a libvirt guest: what `virsh dumpxml GUEST` prints of one that runs.",
)
@_file_option
@_hypervisor_option
@config_option
@json_option
def compare(
    hosts: tuple[str, ...],
    guest: str | None,
    domain: BinaryIO | None,
    files: tuple[Path, ...],
    hypervisor: str | None,
    config: Path | None,
    as_json: bool,
) -> int:
    """Tell which features and models each host lacks of what the others have.

    With --guest or --domain: what each lacks of what the guest has; exits with 1 when a host lacks anything of it. A
    model that --domain names is what --file defines, or else what the first of the hosts that has it gives.
    """
    if (guest is not None) + (domain is not None) > 1:
        raise click.UsageError("give --guest or --domain")
    if files and domain is None:
        raise click.UsageError("--file defines the model of --domain")
    if domain is not None:
        return _compare_domain(
            _ask(config, hosts, hypervisor), domain.read(MAX_FILE_BYTES + 1), files, as_json
        )
    if guest is not None:
        return _compare_guest(config, hosts, guest, as_json=as_json)
    if len(set(hosts)) < 2:
        raise click.UsageError("name two hosts or more, or --guest")
    offers = _ask(config, hosts, hypervisor)
    found = lacks(offers)
    if as_json:
        print_json({"hypervisor": offers[0].hypervisor, "hosts": found})
        return Exit.OK
    for one in found:
        print_facts(
            {
                "host": one.host,
                "lacks features": _words(one.features),
                "lacks models": _words(one.models),
                "has less of": _words(one.smaller),
            }
        )
        click.echo()
    return Exit.OK


@cpu.command(
    name="baseline",
    epilog="""\
\b
Examples:
  vmferry cpu baseline host-a host-b host-c
  vmferry cpu baseline host-a host-b --file /usr/share/libvirt/cpu_map
  vmferry cpu baseline host-a host-b --json | jq -r '.models[0]'
""",
)
@click.argument("hosts", nargs=-1, required=True, type=HOST)
@_file_option
@_hypervisor_option
@config_option
@json_option
def baseline_command(
    hosts: tuple[str, ...],
    files: tuple[Path, ...],
    hypervisor: str | None,
    config: Path | None,
    as_json: bool,
) -> int:
    """Find the largest named model that all hosts run alike, and say which host costs which feature.

    A guest of that model can move between all of them. Exits with 1 when there is no such model.
    """
    candidates = _read_files(files) if files else ()
    offers = _ask(config, hosts, hypervisor)
    found = baseline(offers, candidates)
    if as_json:
        print_json(
            {"hosts": [one.host for one in offers], "hypervisor": offers[0].hypervisor, "baseline": found}
        )
    else:
        _print_baseline(found, [one.host for one in offers])
    return Exit.OK if found.models or found.trimmed else Exit.REFUSED


def _print_baseline(found: Baseline, hosts: Sequence[str]) -> None:
    facts: dict[str, object] = {"hosts": " ".join(hosts), "largest model": _words(found.models)}
    facts["its features"] = f"{len(found.features)}: {_words(found.features)}"
    if found.trimmed is not None:
        cut = "".join(f",-{feature}" for feature in found.trimmed.removed)
        facts["larger"] = f"{found.trimmed.model}{cut} ({len(found.trimmed.features)} features)"
    facts["also in common"] = _words(found.beyond)
    print_facts(facts)
    for doubt in found.doubts:
        click.echo(escaped(f"warning: {doubt}"))
    if found.without:
        click.echo()
        rows = [(one.host, _words(one.features), _words(one.models)) for one in found.without]
        print_table(["WITHOUT HOST", "THE OTHERS HAVE", "LARGEST MODEL"], rows, empty="")
    if found.candidates:
        click.echo()
        rows = [
            (
                one.model,
                str(len(one.features)),
                "; ".join(f"{host} lacks {' '.join(names)}" for host, names in one.lacking.items())
                or "all hosts",
            )
            for one in found.candidates
        ]
        print_table(["MODEL OF FILES", ">FEATURES", "RUNS ON"], rows, empty="")


def _compare_guest(config: Path | None, hosts: Sequence[str], guest: str, *, as_json: bool) -> int:
    fleet = options.open_fleet(config)

    async def find() -> tuple[CpuFacts, str]:
        found = await fleet.locate_guest(guest)
        async with fleet.connect(found.host) as agent:
            listed = next(one for one in (await agent.guests()).guests if one.guest_id == found.guest_id)
            features, source = listed.cpu.features, "asked of the guest"
            if not features:
                # Nobody has asked the guest itself yet: what a guest of its model has there.
                offers = (await agent.cpus()).hypervisors
                known = [
                    one for offer in offers if offer.hypervisor == listed.hypervisor for one in offer.cpus
                ]
                features = next((one.features for one in known if one.model == listed.cpu.model), ())
                source = f"those of {listed.cpu.model} on {found.host}"
        if not features:
            raise SettingsError(
                f"nothing is known of the CPU of {guest}; `vmferry check {guest} --to HOST` asks it"
            )
        return CpuFacts(
            model=listed.cpu.model, features=canonical_all(features)
        ), f"{listed.hypervisor}/{source}"

    its, origin = options.call(find)
    hypervisor, _, source = origin.partition("/")
    return _print_lacking(guest, its, source, _ask(config, hosts, hypervisor), as_json=as_json)


def _compare_domain(offers: Sequence[HostCpus], xml: bytes, files: tuple[Path, ...], as_json: bool) -> int:
    try:
        cpu_of_it = read_domain_cpu(xml)
    except CpuFileInvalid as exc:
        raise SettingsError(f"--domain: {exc}") from exc
    if cpu_of_it.problem:
        raise SettingsError(cpu_of_it.problem)
    known = {f"on {offer.host}": offer for offer in offers}
    if files:
        known = {"of --file": HostCpus(host="", hypervisor="", cpus=_read_files(files))}
    found = ((where, cpu_of_it.features(named_models(offer))) for where, offer in known.items())
    where, features = next(((where, one) for where, one in found if one is not None), ("", None))
    if features is None:
        raise SettingsError(
            f"{cpu_of_it.domain} has the CPU model {cpu_of_it.model}, which none of the hosts has; "
            "--file names a file that defines it, such as /usr/share/libvirt/cpu_map"
        )
    source = f"those of {cpu_of_it.model} {where}, {len(cpu_of_it.added)} with and {len(cpu_of_it.removed)} without"
    if cpu_of_it.check != "full":
        source += "; libvirt has not written out all of them: dump the XML of the guest while it runs"
    its = CpuFacts(model=cpu_of_it.model, features=tuple(sorted(features)))
    return _print_lacking(cpu_of_it.domain, its, source, offers, as_json=as_json)


def _print_lacking(
    guest: str, its: CpuFacts, source: str, offers: Sequence[HostCpus], *, as_json: bool
) -> int:
    wanted = set(its.features)
    missing = {one.host: sorted(wanted - one.features) for one in offers}
    if as_json:
        print_json({"guest": guest, "model": its.model, "features": its.features, "lacking": missing})
    else:
        click.echo(escaped(f"{guest}: CPU model {its.model}, {len(wanted)} features ({source})"))
        rows = [(host, len(features), _words(features)) for host, features in missing.items()]
        print_table(["HOST", ">LACKS", "FEATURES"], rows, empty="")
    return Exit.REFUSED if any(missing.values()) else Exit.OK


def _ask(config: Path | None, hosts: Sequence[str], hypervisor: str | None) -> list[HostCpus]:
    """Ask the hosts side by side; give one hypervisor's models of each, in the order that they were named.

    Raises:
        SettingsError: not all of the hosts have such a hypervisor.
    """
    fleet = options.open_fleet(config)
    wanted = list(dict.fromkeys(hosts))
    answers = options.call(lambda: _ask_all(fleet, wanted))
    common = set.intersection(*({one.hypervisor for one in answers[host]} for host in wanted))
    chosen = hypervisor or (_PREFERRED if _PREFERRED in common else min(common, default=""))
    if chosen not in common:
        which = f"the hypervisor {hypervisor}" if hypervisor else "a hypervisor in common"
        raise SettingsError(
            f"{', '.join(wanted)}: not all of them have {which}; `vmferry hosts` lists what they have"
        )
    return [next(one for one in answers[host] if one.hypervisor == chosen) for host in wanted]


async def _ask_all(fleet: Fleet, hosts: Sequence[str]) -> Mapping[str, tuple[HostCpus, ...]]:
    answers: dict[str, tuple[HostCpus, ...]] = {}

    async def ask(host: str) -> None:
        async with fleet.connect(host) as agent:
            answers[host] = (await agent.cpus()).hypervisors

    async with anyio.create_task_group() as asking:
        for host in hosts:
            asking.start_soon(ask, host)
    return answers


def _read_files(paths: Sequence[Path]) -> tuple[CpuFacts, ...]:
    files: list[tuple[str, bytes]] = []
    for path in paths:
        found = sorted((*path.glob("x86_*.xml"), *path.glob("*.conf"))) if path.is_dir() else [path]
        if len(files) + len(found) > _MAX_FILES:
            raise SettingsError(f"{path}: more than {_MAX_FILES} files")
        for one in found:
            try:
                with one.open("rb") as file:
                    files.append((str(one), file.read(MAX_FILE_BYTES + 1)))
            except OSError as exc:
                raise SettingsError(f"{one} cannot be read: {exc.strerror or exc}") from exc
    try:
        models = read_cpu_files(files)
    except CpuFileInvalid as exc:
        raise SettingsError(str(exc)) from exc
    if not models:
        raise SettingsError(f"{', '.join(map(str, paths))}: no model of a CPU is defined there")
    return models


def _whole(offer: HostCpus) -> str:
    """Say what the host itself is."""
    own = offer.cpu_host
    how = f"its own CPU of {own.vendor or 'an unknown maker'}" if own.is_native else "an emulated CPU"
    scaled = {True: ", scaled for guests", False: ", not scaled for guests", None: ""}[own.has_tsc_scaling]
    tsc = f"; TSC at {own.tsc_khz} kHz{scaled}" if own.tsc_khz else ""
    version = f" {own.version}" if own.version else ""
    return f"{offer.host}: {offer.hypervisor}{version} with {how}, {len(offer.features)} features in all{tsc}"


def _facts(model: CpuFacts) -> dict[str, object]:
    return {
        "model": model.model,
        "vendor": model.vendor or "-",
        "family/model": _numbers(model),
        "kind": "whatever the host gives" if is_host_model(model) else "fixed",
        "features": f"{len(model.features)}: {_words(model.features)}",
    }


def _numbers(model: CpuFacts) -> str:
    return f"{model.family}/{model.number}/{model.stepping}" if model.family else "-"


def _words(words: Sequence[str]) -> str:
    return " ".join(words) or "-"
