"""Every check of the CPU: what it refuses, what it warns of, what it cannot know."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.facts import CpuFacts, GuestCpuFacts, HostCpuFacts
from migrate.preflight import Finding, Inspection, Severity, cpu
from migrate.preflight.cpu import TSC_TOLERANCE_PPM
from tests.migrate.test_preflight import GOOD

OK, WARNING, REFUSED, UNKNOWN = Severity.OK, Severity.WARNING, Severity.REFUSED, Severity.UNKNOWN
INTEL, AMD = "GenuineIntel", "AuthenticAMD"
RUN = GuestCpuFacts(is_native=True, version="7.2.22", host_vendor=INTEL, tsc_khz=2_000_000)
HOST = HostCpuFacts(
    is_native=True,
    version="7.2.22",
    vendor=INTEL,
    tsc_khz=2_000_000,
    has_tsc_scaling=False,
    features=("avx", "sse2"),
)


def pair(
    *features: str,
    there: tuple[str, ...] | None = None,
    model: str = "Haswell",
    other: str = "",
    run: GuestCpuFacts = RUN,
    host: HostCpuFacts = HOST,
    **there_is: object,
) -> Inspection:
    """A guest with these features, and a host whose model of the same name (or `other`) has those of `there`."""
    guest = CpuFacts(model=model, features=features, vendor=INTEL, family=6, number=60, stepping=4)
    given_there = features if there is None else there
    its = replace(guest, model=other or model, features=given_there, **there_is)  # type: ignore[arg-type]
    return replace(
        GOOD,
        guest=replace(GOOD.guest, cpu=guest, cpu_run=run),
        host=replace(GOOD.host, cpus=(its,), cpu_host=host),
    )


def found(inspection: Inspection) -> dict[str, Finding]:
    """Every finding that is not ok; each check has exactly one."""
    findings = list(cpu.judge(inspection))
    assert [one.check for one in findings] == [check.check_id for check in cpu.CHECKS]
    return {one.check: one for one in findings if one.severity is not OK}


def severities(inspection: Inspection) -> dict[str, Severity]:
    return {check: one.severity for check, one in found(inspection).items()}


def test_the_same_cpu_passes() -> None:
    assert severities(pair("avx", "sse2")) == {}


def test_a_missing_feature_is_named_with_the_models_that_both_hosts_have() -> None:
    inspection = pair("aes", "avx", there=("avx",), run=replace(RUN, alternatives=("Westmere", "Broadwell")))
    cpus = tuple(
        CpuFacts(model=name, features=features)
        for name, features in (
            ("Broadwell", ("adx", "aes", "avx")),
            ("EPYC", ("aes", "avx")),
            ("Westmere", ("aes",)),
            ("max", ("aes", "avx")),
        )
    )
    host = replace(inspection.host, cpus=(*inspection.host.cpus, *cpus))
    (finding,) = found(replace(inspection, host=host)).values()
    assert (finding.check, finding.severity) == ("cpu-features", REFUSED)
    assert "lacks CPU features that guest uses: aes" in finding.found
    assert finding.remedy == "Models of host-a and host-b that have all of its features: Broadwell"


def test_spellings_are_no_difference() -> None:
    assert severities(pair("sse4-1", "lahf_lm", there=("sse4.1", "lahf-lm"))) == {}


def test_an_unknown_model_hides_nothing_else() -> None:
    unknown_there = pair("avx", other="Nehalem", host=replace(HOST, features=()))
    assert severities(unknown_there) == {
        "cpu-model": REFUSED,
        "cpu-features": UNKNOWN,
        "cpu-family": UNKNOWN,
        "cpu-microcode": UNKNOWN,
        "cpu-xsave": UNKNOWN,
    }
    lacking = pair("avx", "hle", other="Nehalem", host=replace(HOST, vendor=AMD))
    assert {check for check, one in severities(lacking).items() if one is REFUSED} == {
        "cpu-model",
        "cpu-features",
        "cpu-microcode",
    }
    assert severities(lacking)["cpu-vendor"] is WARNING


def test_features_beside_the_model_are_given_where_the_hypervisor_has_them() -> None:
    inspection = pair("avx", "pcid", there=("avx",), run=replace(RUN, added=("pcid",)))
    assert severities(inspection) == {"cpu-features": REFUSED}
    host = replace(inspection.host, cpu_host=replace(HOST, features=("avx", "pcid")))
    assert severities(replace(inspection, host=host)) == {}


@pytest.mark.parametrize("model", ["host", "max", "host-passthrough", "maximum"])
def test_a_model_of_the_host_is_warned_of_where_all_is_the_same_and_refused_otherwise(model: str) -> None:
    assert severities(pair("avx", model=model)) == {"cpu-host-model": WARNING}
    for changed in (
        pair("avx", model=model, run=replace(RUN, version="8.0.0")),
        pair("avx", model=model, run=replace(RUN, version="")),
        pair("avx", model=model, host=replace(HOST, version="")),
        pair("avx", model=model, vendor=""),
    ):
        assert severities(changed) == {"cpu-host-model": REFUSED}
    assert severities(pair("avx", model=model, there=())) == {
        "cpu-host-model": REFUSED,
        "cpu-features": REFUSED,
    }
    more = found(pair("avx", model=model, there=("avx", "avx2")))["cpu-host-model"]
    assert more.severity is WARNING
    assert "it would see avx2, which it was not started with" in more.found


def test_a_model_that_the_hypervisor_calls_unsafe_is_one_of_the_host() -> None:
    assert severities(pair("avx", is_host_dependent=True)) == {"cpu-host-model": WARNING}


def test_another_maker_is_refused_for_the_hosts_own_model_and_warned_of_for_a_named_one() -> None:
    amd = replace(HOST, vendor=AMD)
    assert severities(pair("avx", host=amd)) == {"cpu-vendor": WARNING}
    assert severities(pair("avx", model="host", host=amd, vendor=AMD)) == {
        "cpu-vendor": REFUSED,
        "cpu-host-model": REFUSED,
    }
    assert severities(pair("avx", host=replace(HOST, vendor=""))) == {"cpu-vendor": UNKNOWN}


def test_an_emulated_guest_has_the_maker_of_its_model() -> None:
    emulated = replace(RUN, is_native=False)
    assert severities(pair("avx", run=emulated, host=replace(HOST, vendor=AMD))) == {}
    assert severities(pair("avx", run=emulated, vendor=AMD)) == {"cpu-vendor": REFUSED}
    assert severities(pair("avx", run=emulated, vendor="")) == {"cpu-vendor": UNKNOWN}


def test_another_family_or_stepping_is_warned_of() -> None:
    assert severities(pair("avx", number=63)) == {"cpu-family": WARNING}
    assert severities(pair("avx", stepping=3)) == {"cpu-family": WARNING}
    assert severities(pair("avx", family=0)) == {"cpu-family": UNKNOWN}


def test_what_comes_with_microcode_has_its_remedy() -> None:
    for vendor, package in ((INTEL, "intel-microcode"), (AMD, "amd64-microcode")):
        run, host = replace(RUN, host_vendor=vendor), replace(HOST, vendor=vendor)
        findings = found(pair("avx", "md-clear", there=("avx",), run=run, host=host))
        assert {check: one.severity for check, one in findings.items()} == {
            "cpu-features": REFUSED,
            "cpu-microcode": REFUSED,
        }
        assert "md-clear" in findings["cpu-microcode"].found
        assert package in findings["cpu-microcode"].remedy
        assert "tsx" not in findings["cpu-microcode"].remedy
    assert "tsx=on" in found(pair("hle", "rtm", there=()))["cpu-microcode"].remedy


@pytest.mark.parametrize("feature", ["xsave", "avx512f", "avx512-bf16", "amx-tile", "pku"])
def test_register_state_that_is_nowhere_there_is_refused(feature: str) -> None:
    findings = found(pair("avx", feature, there=("avx",)))
    assert {check: one.severity for check, one in findings.items()} == {
        "cpu-features": REFUSED,
        "cpu-xsave": REFUSED,
    }
    assert feature in findings["cpu-xsave"].found


def tsc(
    ours: int, theirs: int, *, scales: bool | None = False, invtsc: bool = False, native: bool = True
) -> Severity:
    inspection = pair(
        *(("avx", "invtsc") if invtsc else ("avx",)),
        run=replace(RUN, tsc_khz=ours, is_native=native),
        host=replace(HOST, tsc_khz=theirs, has_tsc_scaling=scales),
    )
    return severities(inspection).get("cpu-tsc", OK)


def test_time_stamp_counters_agree_or_are_scaled() -> None:
    edge = 2_000_000 * TSC_TOLERANCE_PPM // 1_000_000
    assert tsc(2_000_000, 2_000_000 + edge) is OK
    assert tsc(2_000_000, 2_000_000 + edge + 1) is WARNING
    assert tsc(2_000_000, 2_000_000 - edge - 1, invtsc=True) is REFUSED
    assert tsc(2_000_000, 2_400_000, scales=True, invtsc=True) is OK
    # Nothing scales the counter of an emulated CPU.
    assert tsc(2_000_000, 2_400_000, scales=True, invtsc=True, native=False) is REFUSED


def test_rates_that_are_not_known_matter_to_who_relies_on_them() -> None:
    assert tsc(0, 2_000_000) is UNKNOWN
    assert tsc(2_000_000, 0) is UNKNOWN
    assert tsc(0, 0, native=False) is OK
    assert tsc(0, 2_000_000, invtsc=True) is REFUSED
    assert tsc(0, 0, scales=True, invtsc=True) is OK
    assert tsc(-5, 1 << 63) is UNKNOWN


def test_nested_virtualisation_is_refused_without_and_warned_of_with_it() -> None:
    assert severities(pair("avx", "vmx", "vmx-ept", there=("avx", "vmx", "vmx-ept"))) == {
        "cpu-nested": WARNING
    }
    assert severities(pair("avx", "vmx", "vmx-ept", there=("avx", "vmx"))) == {
        "cpu-nested": REFUSED,
        "cpu-features": REFUSED,
    }
    assert severities(pair("svm", there=())) == {"cpu-nested": REFUSED, "cpu-features": REFUSED}
    assert severities(pair("svm", run=replace(RUN, is_native=False))) == {}


words = st.text(max_size=6) | st.sampled_from(["vmx", "hle", "avx512f", "invtsc", "max", "host", INTEL])
whole = st.integers(-(1 << 63), (1 << 63) - 1)
models = st.builds(
    CpuFacts,
    model=words,
    features=st.lists(words, max_size=4).map(tuple),
    vendor=words,
    family=whole,
    number=whole,
    stepping=whole,
    is_host_dependent=st.booleans(),
)
runs = st.builds(
    GuestCpuFacts, is_native=st.booleans(), added=st.lists(words, max_size=2).map(tuple), tsc_khz=whole
)
hosts = st.builds(
    HostCpuFacts,
    is_native=st.booleans(),
    features=st.lists(words, max_size=4).map(tuple),
    tsc_khz=whole,
    has_tsc_scaling=st.sampled_from([None, False, True]),
)


@given(guest=models, run=runs, host=hosts, cpus=st.lists(models, max_size=3))
def test_nonsense_gets_one_finding_for_each_check(
    guest: CpuFacts, run: GuestCpuFacts, host: HostCpuFacts, cpus: list[CpuFacts]
) -> None:
    found(
        replace(
            GOOD,
            guest=replace(GOOD.guest, cpu=guest, cpu_run=run),
            host=replace(GOOD.host, cpus=tuple(cpus), cpu_host=host),
        )
    )
