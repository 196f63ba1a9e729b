from __future__ import annotations

import pytest

from agents.hypervisors.embedded.cpuid import (
    FEATURE_NAMES,
    facts_of_model,
    features_of_bits,
    features_of_model,
)
from agents.hypervisors.embedded.spec import CPU_MODELS


@pytest.mark.parametrize("cpu_model", CPU_MODELS)
def test_every_model_has_what_the_program_needs(cpu_model: str) -> None:
    features = features_of_model(cpu_model)
    assert {"fpu", "cmov", "sse", "sse2", "lm", "fxsr"} <= set(features)
    assert list(features) == sorted(set(features))


def test_newer_models_can_do_more() -> None:
    assert "bmi2" in features_of_model("Haswell")
    assert "bmi2" not in features_of_model("Nehalem")
    assert "sse4a" in features_of_model("EPYC")
    assert "sse4a" not in features_of_model("Haswell")


def test_a_model_says_who_made_it_and_which_it_is() -> None:
    haswell, epyc = facts_of_model("Haswell"), facts_of_model("EPYC")
    assert (haswell.vendor, haswell.family, haswell.number, haswell.level) == ("GenuineIntel", 6, 60, 13)
    assert (epyc.vendor, epyc.family, epyc.number) == ("AuthenticAMD", 23, 1)


def test_each_bit_is_the_name_at_its_place() -> None:
    assert features_of_bits({(1, 0, "edx"): 1 << 26 | 1}) == ("fpu", "sse2")
    assert features_of_bits({(0x80000001, 0, "edx"): 1 << 29}) == ("lm",)
    assert features_of_bits({(7, 0, "ebx"): 1 << 5 | 1 << 31}) == ("avx2", "avx512vl")
    assert features_of_bits({(1, 0, "edx"): 1 << 10}) == ()
    assert features_of_bits({(99, 0, "eax"): 1}) == ()


def test_no_register_has_more_names_than_bits_and_no_name_has_two_places() -> None:
    names = [name for text in FEATURE_NAMES.values() for name in text.split() if name != "-"]
    assert len(names) == len(set(names))
    assert max(len(text.split()) for text in FEATURE_NAMES.values()) <= 32
