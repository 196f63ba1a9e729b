from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agents import sections
from agents.errors import ConfigInvalid, SettingsError
from agents.sections import Endpoint, Section, endpoint, integer, loopback, paths, ratio, read_toml, text


def test_a_wrong_value_is_noted_and_reading_goes_on() -> None:
    problems: list[str] = []
    section = Section({"a": 1, "b": True}, "outer", problems)
    assert section.required("a", text, "placeholder") == "placeholder"
    assert section.optional("b", integer(0, 9), 7) == 7
    assert section.required("c", text, "missing") == "missing"
    assert problems == [
        "outer.a: must be a string, not a number",
        "outer.b: must be a whole number, not a boolean",
        "outer.c: is missing",
    ]


def test_an_unknown_key_is_noted_with_the_nearest_known_one() -> None:
    problems: list[str] = []
    section = Section({"connection": 1, "zzz": 2}, "limits", problems)
    section.optional("connections", integer(1, 4), 1)
    section.finish()
    assert problems == [
        "limits.connection: is not a key that is known here; did you mean 'connections'?",
        "limits.zzz: is not a key that is known here",
    ]


def test_a_value_where_a_table_belongs_is_noted() -> None:
    problems: list[str] = []
    root = Section({"agent": 3, "peers": {"host-b": "host-b:7700"}}, "", problems)
    assert "name" not in root.section("agent")
    assert root.sections("peers") == {}
    assert problems == ["agent: must be a table, not a number", "peers.host-b: must be a table, not a string"]


@pytest.mark.parametrize(("value", "is_inside"), [(1, True), (4, True), (0, False), (5, False)])
def test_the_limits_of_a_number_are_inside(value: int, is_inside: bool) -> None:
    problems: list[str] = []
    Section({"n": value}, "", problems).optional("n", integer(1, 4), 1)
    assert (problems == []) is is_inside


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (1, None),
        (0.5, None),
        (2.0, None),
        (2.1, "n: must be between 0.5 and 2, not 2.1"),
        (True, "n: must be a number, not a boolean"),
        ("1.0", "n: must be a number, not a string"),
    ],
)
def test_a_ratio_is_a_number_with_a_fraction_or_without(value: object, problem: str | None) -> None:
    problems: list[str] = []
    Section({"n": value}, "", problems).optional("n", ratio(0.5, 2.0), 1.0)
    assert problems == ([] if problem is None else [problem])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("host-b:7700", Endpoint("host-b", 7700)),
        ("192.0.2.7:1", Endpoint("192.0.2.7", 1)),
        ("[2001:db8::1]:65535", Endpoint("2001:db8::1", 65535)),
    ],
)
def test_an_endpoint_comes_back_as_it_was_written(words: str, expected: Endpoint) -> None:
    assert endpoint(may_be_any_port=False)(words) == expected
    assert str(expected) == words


@pytest.mark.parametrize(
    "words",
    [
        "",
        "host",
        ":7700",
        "host:",
        "host:0",
        "host:65536",
        "2001:db8::1:7700",
        "[host]:1",
        "a b:1",
        "host:-1",
        7700,
    ],
)
def test_what_is_no_endpoint_is_refused(words: object) -> None:
    with pytest.raises(SettingsError):
        endpoint(may_be_any_port=False)(words)


def test_port_zero_is_only_for_listening() -> None:
    assert endpoint(may_be_any_port=True)("127.0.0.1:0").port == 0


@pytest.mark.parametrize("words", ["127.0.0.1:1", "127.9.9.9:1", "[::1]:1", "localhost:1"])
def test_loopback_is_what_no_other_host_reaches(words: str) -> None:
    assert str(loopback(words)) == words


@pytest.mark.parametrize("words", ["0.0.0.0:7702", "192.0.2.7:7702", "[::]:7702", "localhost.example:7702"])
def test_what_others_reach_is_no_loopback(words: str) -> None:
    with pytest.raises(SettingsError, match=r"use 127\.0\.0\.1:7702"):
        loopback(words)


def test_relative_paths_start_at_the_base(tmp_path: Path) -> None:
    assert paths(tmp_path)("pki/ca.crt") == tmp_path / "pki" / "ca.crt"
    assert paths(tmp_path)("/etc/ca.crt") == Path("/etc/ca.crt")


@pytest.mark.parametrize("words", ["", "a\0b", "~nobody-of-that-name/x", 3])
def test_what_is_no_path_is_refused(tmp_path: Path, words: object) -> None:
    with pytest.raises(SettingsError):
        paths(tmp_path)(words)


def test_a_syntax_error_is_said_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "agent.toml"
    path.write_text("[agent]\nname = host-a\n")
    with pytest.raises(ConfigInvalid, match="line 2"):
        read_toml(path)


def test_a_byte_that_is_no_text_is_said_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "agent.toml"
    path.write_bytes(b"[agent]\n\nname = '\xff'\n")
    with pytest.raises(ConfigInvalid, match="line 3 is not UTF-8"):
        read_toml(path)


def test_the_largest_file_is_read_and_one_byte_more_is_not(tmp_path: Path) -> None:
    path = tmp_path / "agent.toml"
    path.write_bytes(b"#" * sections.MAX_FILE_BYTES)
    assert read_toml(path) == {}
    path.write_bytes(b"#" * (sections.MAX_FILE_BYTES + 1))
    with pytest.raises(ConfigInvalid, match="larger than"):
        read_toml(path)


def test_a_file_nested_too_deeply_is_said_so(tmp_path: Path) -> None:
    path = tmp_path / "agent.toml"
    path.write_text("a = " + "[" * 10_000)
    with pytest.raises(ConfigInvalid):
        read_toml(path)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=100))
def test_garbage_raises_only_config_invalid(tmp_path: Path, garbage: bytes) -> None:
    path = tmp_path / "garbage.toml"
    path.write_bytes(garbage)
    try:
        read_toml(path)
    except ConfigInvalid:
        return
