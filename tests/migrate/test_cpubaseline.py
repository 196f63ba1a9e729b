from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from migrate.cpubaseline import HostCpus, baseline, lacks, named_models
from migrate.facts import CpuFacts, HostCpuFacts


def offer(host: str, *, vendor: str = "", more: tuple[str, ...] = (), **models: str) -> HostCpus:
    """A host whose models have these features: each a word of letters, one a feature."""
    cpus = tuple(CpuFacts(model=name, features=tuple(features)) for name, features in models.items())
    return HostCpus(
        host=host, hypervisor="fake", cpus=cpus, cpu_host=HostCpuFacts(features=more, vendor=vendor)
    )


def test_the_largest_model_that_all_run_alike() -> None:
    found = baseline(
        [offer("a", small="ab", large="abc", max="abcdz"), offer("b", small="ab", large="abc", max="abz")]
    )
    assert found.models == ("large",)
    assert found.features == ("a", "b", "c")
    assert found.beyond == ("z",)
    assert found.trimmed is None


def test_models_with_equally_many_features_are_all_named() -> None:
    found = baseline([offer("a", one="ab", two="bc", three="ab")])
    assert found.models == ("one", "three", "two")
    # What is in each of them, whichever is taken.
    assert found.features == ("b",)
    assert found.beyond == ("a", "c")
    assert found.without == ()


def test_a_model_that_some_host_has_less_of_is_offered_without_that() -> None:
    found = baseline([offer("a", small="ab", large="abcde"), offer("b", small="ab", large="abce")])
    assert found.models == ("small",)
    assert found.trimmed is not None
    assert (found.trimmed.model, found.trimmed.removed, found.trimmed.features) == (
        "large",
        ("d",),
        tuple("abce"),
    )
    assert found.beyond == ("c", "e")


def test_the_host_that_costs_a_feature_is_named() -> None:
    hosts = [offer("a", small="ab", large="abc"), offer("b", small="ab", large="abc"), offer("c", small="ab")]
    found = {one.host: one for one in baseline(hosts).without}
    assert found["c"].features == ("c",)
    assert found["c"].models == ("large",)
    assert (found["a"].features, found["a"].models) == ((), ("small",))


def test_models_of_the_host_and_empty_ones_are_none_in_common() -> None:
    found = baseline(
        [offer("a", maximum="abc", max="abc", base=""), offer("b", maximum="abc", max="abc", base="")]
    )
    assert (found.models, found.features, found.beyond) == ((), (), ("a", "b", "c"))
    assert found.trimmed is None
    unsafe = HostCpus(
        host="a", hypervisor="fake", cpus=(CpuFacts(model="odd", features=("a",), is_host_dependent=True),)
    )
    assert named_models(unsafe) == {}


def test_models_of_files_say_where_they_run() -> None:
    hosts = [offer("a", m="ab", more=("c",)), offer("b", m="ab")]
    candidates = [CpuFacts(model="x", features=("a",)), CpuFacts(model="y", features=("a", "c", "d"))]
    y, x = baseline(hosts, candidates).candidates
    assert (x.model, x.lacking) == ("x", {})
    assert (y.model, y.lacking) == ("y", {"a": ("d",), "b": ("c", "d")})


def test_what_differs_besides_is_doubted() -> None:
    assert baseline([offer("a", vendor="X"), offer("b", vendor="X"), offer("c")]).doubts == ()
    (doubt,) = baseline([offer("a", vendor="Y"), offer("b", vendor="X"), offer("c")]).doubts
    assert "CPUs of X and Y" in doubt
    native, newer = HostCpuFacts(is_native=True, version="1"), HostCpuFacts(version="2")
    mixed, versions = baseline(
        [replace(offer("a"), cpu_host=native), replace(offer("b"), cpu_host=newer), offer("c")]
    ).doubts
    assert "on the CPU of a and are emulated on b, c" in mixed
    assert "versions 1, 2" in versions
    assert baseline([]).models == ()


def test_each_host_lacks_what_another_has() -> None:
    a, b = lacks([offer("a", m="abc", n="a"), offer("b", m="ab")])
    assert (a.features, a.models, a.smaller) == ((), (), ())
    assert (b.features, b.models, b.smaller) == (("c",), ("n",), ("m",))


features = st.text("abcd", max_size=4)


def of_words(models: dict[str, str]) -> HostCpus:
    return HostCpus(
        host="h",
        hypervisor="fake",
        cpus=tuple(CpuFacts(model=name, features=tuple(words)) for name, words in models.items()),
    )


hosts = st.lists(
    st.dictionaries(st.sampled_from("mnop"), features, max_size=4).map(of_words),
    min_size=1,
    max_size=4,
)


@given(hosts)
def test_every_host_has_every_feature_of_the_baseline(offers: list[HostCpus]) -> None:
    found = baseline(offers)
    for one in offers:
        for model in found.models:
            assert set(found.features) <= named_models(one)[model]
        assert set(found.beyond) <= one.features
        if found.trimmed is not None:
            assert set(found.trimmed.features) <= named_models(one)[found.trimmed.model]
            assert set(found.trimmed.features) == named_models(one)[found.trimmed.model] - set(
                found.trimmed.removed
            )
