from __future__ import annotations

import pytest

from migrate import cpunames
from migrate.cpunames import canonical, canonical_all


@pytest.mark.parametrize(
    ("name", "spelling"),
    [
        ("sse4_1", "sse4.1"),
        ("sse4-2", "sse4.2"),
        ("sse4.1", "sse4.1"),
        ("SSE3", "pni"),
        ("lahf_lm", "lahf-lm"),
        ("pclmuldq", "pclmulqdq"),
        ("i64", "lm"),
        ("ffxsr", "fxsr-opt"),
        ("arch-facilities", "arch-capabilities"),
        ("unheard_of", "unheard-of"),
    ],
)
def test_a_feature_has_one_spelling(name: str, spelling: str) -> None:
    assert canonical(name) == spelling
    assert canonical(spelling) == spelling


def test_names_of_one_feature_are_one() -> None:
    assert canonical_all(["sse4-1", "sse4_1", "avx", "sse4.1"]) == ("avx", "sse4.1")


def test_a_name_that_no_hypervisor_has_is_not_remembered() -> None:
    before = cpunames._remembered.cache_info().currsize
    assert canonical("A_" * 1000) == "a-" * 1000
    assert cpunames._remembered.cache_info().currsize == before
