from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agents.storageproof.urls import MAX_URL_BYTES, SCHEMES, DiskUrl, matches, parse, problem_of_pattern


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("nbd://store1:10809/guest-1", DiskUrl("nbd", "store1", 10809, "/guest-1")),
        ("nbd://store1/guest-1", DiskUrl("nbd", "store1", 10809, "/guest-1")),
        ("nbd://[fd00::7]:1/a", DiskUrl("nbd", "fd00::7", 1, "/a")),
        (
            "iscsi://10.0.0.5/iqn.2001-04.com.example:disk/1",
            DiskUrl("iscsi", "10.0.0.5", 3260, "/iqn.2001-04.com.example:disk/1"),
        ),
        ("ssh://vm@store1/srv/a.raw", DiskUrl("ssh", "store1", 22, "/srv/a.raw")),
        ("rbd://mon1/guests/web1", DiskUrl("rbd", "mon1", 3300, "/guests/web1")),
        ("rbd://vm@mon1/guests/web1", DiskUrl("rbd", "mon1", 3300, "/guests/web1", "vm")),
    ],
)
def test_a_url_is_taken_apart(url: str, found: DiskUrl) -> None:
    assert parse(url) == found


@pytest.mark.parametrize(
    "url",
    [
        "/srv/a.raw",
        "file:///etc/shadow",
        "json://x",
        "nbd://",
        "nbd://store1/a,read-only=on",
        "nbd://store1/a?socket=/run/x",
        "nbd://store1/a b",
        "nbd://store1/../a",
        "nbd://store1/a\n",
        "nbd://store1:0/a",
        "nbd://store1:65536/a",
        "nbd+unix:///a",
        "nbd://store1/" + "a" * MAX_URL_BYTES,
    ],
)
def test_what_is_no_url_of_another_host_is_none(url: str) -> None:
    assert parse(url) is None
    assert not matches(url, [url, "*", "nbd://*"])


def test_a_star_stays_within_a_name() -> None:
    patterns = ["nbd://store1:10809/guest-*", "nbd://*.example:10809/x"]
    assert matches("nbd://store1:10809/guest-1.raw", patterns)
    assert matches("nbd://a.b.example:10809/x", patterns)
    for strange in (
        "nbd://store1:10809/guest-1/other",
        "nbd://store1:10809/other",
        "nbd://store1:108099/guest-1",
        "nbd://store2:10809/guest-1",
        "nbd://evil@store1:10809/guest-1",
        "nbd://evil/a.example:10809/x",
    ):
        assert not matches(strange, patterns), strange


def test_a_user_of_ceph_is_part_of_the_place() -> None:
    assert matches("rbd://vm@mon1:3300/guests/web1", ["rbd://vm@mon1:3300/guests/*"])
    for other in ("rbd://mon1:3300/guests/web1", "rbd://admin@mon1:3300/guests/web1"):
        assert not matches(other, ["rbd://vm@mon1:3300/guests/*"])
        place = parse(other)
        assert place is not None
        assert place.words == other


def test_a_hostile_url_is_judged_at_once() -> None:
    began_s = time.perf_counter()
    assert not matches("nbd://h/" + "a" * 1000, ["nbd://h/" + "*a" * 40 + "b"])
    assert time.perf_counter() - began_s < 0.5


def test_a_pattern_is_a_url_with_stars() -> None:
    for good in ("nbd://store1:10809/guest-*", "iscsi://*/iqn.x:*/0", "nbd://store1:10809/a"):
        assert problem_of_pattern(good) is None
    for bad in ("*", "nbd://*?x", "file:///srv/*", "nbd://store1/*,x", "/srv/*"):
        assert "is no URL of" in (problem_of_pattern(bad) or ""), bad


@given(st.sampled_from(SCHEMES), st.text(max_size=40), st.text(max_size=40))
def test_every_word_is_refused_or_means_one_place(scheme: str, host: str, path: str) -> None:
    found = parse(f"{scheme}://{host}/{path}")
    if found is not None:
        assert parse(found.words) == found
        assert not set(found.words) & set(", \n\t\"'\\?#%*")
