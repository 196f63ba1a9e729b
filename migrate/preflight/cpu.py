"""The CPU that the guest was started with, against what the destination's hypervisor can give."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from migrate.preflight.cpufit import MICROCODE, NESTED, CpuFit, is_state
from migrate.preflight.evidence import Inspection, named
from migrate.preflight.report import Check, Finding

__all__ = ["CHECKS", "CPU_FEATURES", "CPU_MODEL", "TSC_TOLERANCE_PPM", "judge"]

CPU_MODEL: Final = Check(
    check_id="cpu-model",
    asked="Can the destination's hypervisor give the guest's CPU model?",
    why="The machine there is started with the same model, and a hypervisor refuses one that it does not know",
    remedy="Start the guest with a CPU model that both hosts have (`vmferry cpu baseline HOST...` names them)",
)
CPU_FEATURES: Final = Check(
    check_id="cpu-features",
    asked="Has the destination every CPU feature that the guest was started with?",
    why="A guest's kernel and programs chose their instructions when they started: a missing one kills them",
    remedy="Start the guest with a smaller CPU model, or move it to another host",
)
CPU_HOST_MODEL: Final = Check(
    check_id="cpu-host-model",
    asked="If the guest's CPU model is whatever its host gives, is it proved to be the same at the destination?",
    why="Such a model (host, max, host-passthrough, maximum) has no fixed features: they are those of one host and one "
    "version of the hypervisor",
    remedy="Start the guest with a named model: `vmferry cpu baseline HOST...` finds the largest that all hosts have",
)
CPU_VENDOR: Final = Check(
    check_id="cpu-vendor",
    asked="Are the CPUs at both ends of the same maker?",
    why="System calls, virtualisation and the mitigations of CPU bugs differ between makers; a running kernel does not "
    "look again",
    remedy="Move it to a host with a CPU of the same maker, or stop it and start it there",
)
CPU_FAMILY: Final = Check(
    check_id="cpu-family",
    asked="Would the guest read the same family and model of its CPU at the destination?",
    why="A kernel chooses its workarounds for CPU bugs by family and model when it starts",
    remedy="Run the same version of the hypervisor on both hosts, or start the guest with a named model",
)
CPU_MICROCODE: Final = Check(
    check_id="cpu-microcode",
    asked="Has the destination the features that depend on microcode (TSX, mitigations of CPU bugs)?",
    why="CPUs of one model differ by their microcode: the guest uses registers and instructions that are not there "
    "without it",
    remedy="Bring both hosts to the same microcode and kernel options",
)
CPU_XSAVE: Final = Check(
    check_id="cpu-xsave",
    asked="Can the destination hold all register state of the guest (XSAVE, AVX-512, AMX)?",
    why="The state of registers that the destination's CPU does not have can be loaded nowhere",
    remedy="Move it to a host that has them, or start the guest with a model without them",
)
CPU_TSC: Final = Check(
    check_id="cpu-tsc",
    asked="Does the guest's time stamp counter go on at the same rate?",
    why="A guest that takes the counter for its clock runs fast or slow where it ticks at another rate",
    remedy="Move it to a host with the same TSC frequency, or one whose CPU and kernel scale it for guests",
)
CPU_NESTED: Final = Check(
    check_id="cpu-nested",
    asked="If the guest can run virtual machines of its own, can it at the destination?",
    why="A hypervisor inside the guest fails where its instructions are gone, and its own guests with it",
    remedy="Switch on nested virtualisation there (nested=1 of kvm_intel or kvm_amd), or start the guest without it",
)
CHECKS: Final = (
    CPU_MODEL,
    CPU_FEATURES,
    CPU_HOST_MODEL,
    CPU_VENDOR,
    CPU_FAMILY,
    CPU_MICROCODE,
    CPU_XSAVE,
    CPU_TSC,
    CPU_NESTED,
)

# KVM's own default, tsc_tolerance_ppm: what NTP corrects. Beyond it KVM scales or refuses.
TSC_TOLERANCE_PPM: Final = 250


def judge(inspection: Inspection) -> Iterator[Finding]:
    """Judge the model and every feature of it."""
    guest, host = inspection.guest, inspection.host
    if guest.hypervisor != host.hypervisor:
        # The hypervisor is refused; what CPUs another one has is no answer.
        for check in CHECKS:
            yield check.unknown(f"{host.name} has no {guest.hypervisor} to ask", "")
        return
    fit, name, there = CpuFit.of(inspection), guest.name, host.name
    advice = _advice(fit, inspection.source_host, there)
    if fit.model is not None:
        yield CPU_MODEL.ok(f"{there} gives the model {fit.guest.model}")
    else:
        yield CPU_MODEL.refused(
            f"{name} was started with CPU model {fit.guest.model}, which {there} cannot give", advice
        )
    yield _features(fit, name, there, advice)
    yield _host_model(fit, name, there, advice)
    yield _vendor(fit, inspection)
    yield _family(fit, name, there)
    yield _microcode(fit, name, there)
    yield _xsave(fit, name, there)
    yield _tsc(fit, name, there)
    yield _nested(fit, name, there)


def _advice(fit: CpuFit, here: str, there: str) -> str:
    if fit.fitting_both:
        return f"Models of {here} and {there} that have all of its features: {named(fit.fitting_both)}"
    if fit.fitting:
        return f"Models there that have all of them: {named(fit.fitting)}"
    if not fit.is_known:
        return f"{there} names no CPU models: see what it says of its hypervisor"
    return "No model there has all of them: start the guest with a smaller CPU model"


def _features(fit: CpuFit, name: str, there: str, advice: str) -> Finding:
    what = fit.guest.model if fit.model is not None else "hypervisor"
    if not fit.is_known:
        return CPU_FEATURES.unknown(
            f"what {there} could give instead of {fit.guest.model} is not known", advice
        )
    if fit.missing:
        return CPU_FEATURES.refused(
            f"{there}'s {what} lacks CPU features that {name} uses: {', '.join(fit.missing)}", advice
        )
    return CPU_FEATURES.ok(f"{there}'s {what} has all {len(fit.wanted)} features that {name} uses")


def _host_model(fit: CpuFit, name: str, there: str, advice: str) -> Finding:
    model = fit.guest.model
    if not fit.is_host_dependent:
        return CPU_HOST_MODEL.ok(f"{model} is the same on every host that has it")
    doubts = []
    for what, ours, theirs in (
        ("hypervisor's version", fit.run.version, fit.host.version),
        ("CPU's maker", fit.guest.vendor, fit.model.vendor if fit.model else ""),
    ):
        if not ours or not theirs:
            doubts.append(
                f"the {what} is not known at both ends ({ours or 'unknown'}, {theirs or 'unknown'})"
            )
        elif ours != theirs:
            doubts.append(f"the {what} is {ours} at the source and {theirs} there")
    if fit.missing:
        doubts.append(f"{len(fit.missing)} of its features are missing there")
    if doubts:
        return CPU_HOST_MODEL.refused(
            f"{name} has the CPU model {model}, which is whatever its host gives, and {there}'s is not proved to be "
            f"the same: {'; '.join(doubts)}",
            f"Start the guest with a named model. {advice}",
        )
    more = f"; it would see {named(fit.gained)}, which it was not started with" if fit.gained else ""
    return CPU_HOST_MODEL.warning(
        f"{name} has the CPU model {model}, which depends on the host and on the hypervisor's version "
        f"({fit.run.version} at both ends, and all features are there{more})"
    )


def _vendor(fit: CpuFit, inspection: Inspection) -> Finding:
    name, there = inspection.guest.name, inspection.host.name
    if fit.run.is_native:
        ours, theirs = fit.run.host_vendor or fit.guest.vendor, fit.host.vendor
        where = f"{inspection.source_host} has a CPU of {ours} and {there} one of {theirs}"
    else:
        ours, theirs = fit.guest.vendor, fit.model.vendor if fit.model else ""
        where = f"{name}'s CPU is of {ours} and {there}'s {fit.guest.model} of {theirs}"
    if not ours or not theirs:
        return CPU_VENDOR.unknown(
            f"the CPUs' makers are not known at both ends ({ours or 'unknown'}, {theirs or 'unknown'})"
        )
    if ours == theirs:
        return CPU_VENDOR.ok(f"the CPUs at both ends are of {ours}")
    if fit.run.is_native and not fit.is_host_dependent:
        return CPU_VENDOR.warning(
            f"{where}: {name} runs on the hosts' own CPUs and would keep the name and the workarounds of {ours}",
        )
    return CPU_VENDOR.refused(where)


def _family(fit: CpuFit, name: str, there: str) -> Finding:
    guest, model = fit.guest, fit.model
    if model is None or not guest.family or not model.family:
        return CPU_FAMILY.unknown(f"the family and model that {name} would read on {there} are not known")
    ours, theirs = (
        f"family {cpu.family}, model {cpu.number}, stepping {cpu.stepping}" for cpu in (guest, model)
    )
    if ours == theirs:
        return CPU_FAMILY.ok(f"{name} reads {ours} at both ends")
    return CPU_FAMILY.warning(f"{name} reads {ours}, and on {there} would read {theirs}")


def _microcode(fit: CpuFit, name: str, there: str) -> Finding:
    if not fit.is_known:
        return CPU_MICROCODE.unknown(f"what {there} could give is not known")
    missing = [feature for feature in fit.missing if feature in MICROCODE]
    if not missing:
        count = len(fit.wanted & MICROCODE)
        return CPU_MICROCODE.ok(f"{there} has all {count} features of {name} that depend on microcode")
    package = {
        "GenuineIntel": "intel-microcode (microcode_ctl on Red Hat)",
        "AuthenticAMD": "amd64-microcode (linux-firmware on Red Hat)",
    }.get(fit.host.vendor or fit.guest.vendor, "the CPU maker's microcode")
    remedy = f"Install {package} or newer firmware on {there}, restart the host, and its agent sees them"
    if {"hle", "rtm"} & set(missing):
        remedy += (
            "; newer microcode and kernels switch TSX (hle, rtm) off: boot it with tsx=on if the CPU still has it, "
            "or start the guest with a model whose name ends in -noTSX"
        )
    return CPU_MICROCODE.refused(
        f"{there} lacks features that {name} uses and that come with microcode: {', '.join(missing)}", remedy
    )


def _xsave(fit: CpuFit, name: str, there: str) -> Finding:
    if not fit.is_known:
        return CPU_XSAVE.unknown(f"what {there} could give is not known")
    missing = [feature for feature in fit.missing if is_state(feature)]
    if missing:
        return CPU_XSAVE.refused(
            f"{name} has register state of {', '.join(missing)}, and {there} has no such registers"
        )
    count = sum(map(is_state, fit.wanted))
    return CPU_XSAVE.ok(f"{there} has all {count} features of {name} that mean extended register state")


def _tsc(fit: CpuFit, name: str, there: str) -> Finding:
    ours, theirs, relies = fit.run.tsc_khz, fit.host.tsc_khz, "invtsc" in fit.wanted
    promise = f"{name} was promised a time stamp counter of one rate (invtsc)" if relies else name
    if ours > 0 and theirs > 0:
        if abs(ours - theirs) * 1_000_000 <= ours * TSC_TOLERANCE_PPM:
            return CPU_TSC.ok(f"the time stamp counters run at {ours} kHz here and {theirs} kHz on {there}")
        rates = f"{promise} sees {ours} kHz, and {there}'s counter runs at {theirs} kHz"
        if fit.run.is_native and fit.host.has_tsc_scaling:
            return CPU_TSC.ok(f"{rates}, which it scales for its guests")
        return CPU_TSC.refused(rates) if relies else CPU_TSC.warning(rates)
    if fit.run.is_native and fit.host.has_tsc_scaling:
        return CPU_TSC.ok(f"{there} scales its counter for guests")
    if relies:
        return CPU_TSC.refused(
            f"{promise}, and it is not known at both ends ({ours or 'unknown'} kHz, {theirs or 'unknown'} kHz)"
        )
    if not fit.run.is_native:
        return CPU_TSC.ok(f"{name}'s CPU is emulated, and no counter of one rate was promised to it")
    return CPU_TSC.unknown(
        f"the counters' rates are not known at both ends ({ours or 'unknown'} kHz, {theirs or 'unknown'} kHz)"
    )


def _nested(fit: CpuFit, name: str, there: str) -> Finding:
    wanted = sorted(fit.wanted & NESTED)
    if not wanted:
        return CPU_NESTED.ok(f"{name} has no virtualisation of its own")
    if not fit.is_known:
        return CPU_NESTED.unknown(f"what {there} could give is not known")
    missing = [feature for feature in fit.missing if feature in NESTED or feature.startswith("vmx-")]
    if missing:
        return CPU_NESTED.refused(
            f"{name} can run virtual machines ({', '.join(wanted)}), and {there} does not give {named(missing)}"
        )
    if not fit.run.is_native:
        return CPU_NESTED.ok(f"{there} emulates {', '.join(wanted)} too")
    return CPU_NESTED.warning(
        f"{name} can run virtual machines ({', '.join(wanted)}), and so can it on {there}: guests inside it move with "
        "it only with Linux 5.3 or newer on both hosts",
        "End the virtual machines inside the guest first, or start it without the feature",
    )
