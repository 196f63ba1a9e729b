from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from agents.api import CpuView, GetCpus, ListGuests
from agents.cli.main import main
from agents.cli.output import Exit
from migrate.cpubaseline import HostCpus
from migrate.facts import CpuFacts, HostCpuFacts
from tests.agents.cli.conftest import Agents, Respond
from tests.agents.scripted_agent import guest_facts, guest_list
from tests.migrate.test_cpufiles import CPUDEF, NEW, OLD

SMALL = CpuFacts(
    model="Nehalem", features=("pni", "sse2"), vendor="GenuineIntel", family=6, number=26, stepping=3
)
LARGE = CpuFacts(model="Haswell", features=("avx", "avx2", "pni", "sse2"), vendor="GenuineIntel")
MAX = CpuFacts(model="max", features=("avx", "avx2", "pni", "sse2"), is_host_dependent=True)


def host(name: str, *cpus: CpuFacts, vendor: str = "GenuineIntel", hypervisor: str = "qemu") -> Respond:
    offers = (
        HostCpus(host=name, hypervisor="embedded", cpus=(SMALL,)),
        HostCpus(host=name, hypervisor=hypervisor, cpus=cpus, cpu_host=HostCpuFacts(vendor=vendor)),
    )

    def respond(request: object) -> Sequence[object]:
        match request:
            case GetCpus():
                return [CpuView(hypervisors=offers)]
            case ListGuests():
                facts = replace(guest_facts(), hypervisor=hypervisor, cpu=replace(LARGE, features=()))
                return [guest_list(name, facts)] if name == "host-a" else [guest_list(name)]
            case _:
                raise AssertionError(f"nobody asks {request}")

    return respond


@pytest.fixture
def three(agents: Agents) -> Agents:
    agents.hosts["host-a"] = host("host-a", SMALL, LARGE, MAX)
    agents.hosts["host-b"] = host("host-b", SMALL, LARGE, MAX)
    agents.hosts["host-c"] = host(
        "host-c", SMALL, replace(LARGE, features=("avx", "pni", "sse2")), vendor="AuthenticAMD"
    )
    return agents


def test_a_hosts_models_are_listed_and_one_of_them_shown(
    three: Agents, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cpu", "show", "host-a"]) == Exit.OK
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["MODEL", "VENDOR", "FAMILY/MODEL", "FEATURES", "KIND"]
    assert lines[1:-1] == [
        ["Nehalem", "GenuineIntel", "6/26/3", "2", "fixed"],
        ["Haswell", "GenuineIntel", "-", "4", "fixed"],
        ["max", "-", "-", "4", "host"],
    ]
    assert " ".join(lines[-1]) == "host-a: qemu with an emulated CPU, 4 features in all"
    assert main(["cpu", "show", "host-a", "--model", "Haswell"]) == Exit.OK
    assert "4: avx avx2 pni sse2" in capsys.readouterr().out
    assert main(["cpu", "show", "host-a", "--hypervisor", "embedded", "--json"]) == Exit.OK
    assert [one["model"] for one in json.loads(capsys.readouterr().out)["models"]] == ["Nehalem"]
    assert main(["cpu", "show", "host-a", "--model", "Nonsense"]) == Exit.USAGE


def test_hosts_are_compared(three: Agents, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cpu", "compare", "host-a", "host-c", "--json"]) == Exit.OK
    a, c = json.loads(capsys.readouterr().out)["hosts"]
    assert (a["host"], a["features"], a["models"]) == ("host-a", [], [])
    assert (c["host"], c["features"], c["smaller"]) == ("host-c", ["avx2"], ["Haswell"])
    assert main(["cpu", "compare", "host-a", "host-c"]) == Exit.OK
    assert "avx2" in capsys.readouterr().out
    assert main(["cpu", "compare", "host-a", "host-a"]) == Exit.USAGE


def test_a_guests_cpu_is_compared_with_hosts(three: Agents, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cpu", "compare", "--guest", "vm1", "host-b"]) == Exit.OK
    assert main(["cpu", "compare", "--guest", "vm1", "host-b", "host-c", "--json"]) == Exit.REFUSED
    shown = capsys.readouterr().out
    assert "those of Haswell on host-a" in shown
    assert json.loads(shown[shown.index("{") :])["lacking"] == {"host-b": [], "host-c": ["avx2"]}


def domain(tmp_path: Path, cpu: str) -> str:
    path = tmp_path / "web2.xml"
    path.write_text(f"<domain><name>web2</name>{cpu}</domain>")
    return str(path)


CUSTOM = (
    "<cpu mode='custom' check='full'><model>{model}</model><feature policy='{policy}' name='avx2'/></cpu>"
)


def test_the_cpu_of_a_libvirt_guest_is_compared_with_hosts(
    three: Agents, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    wants = domain(tmp_path, CUSTOM.format(model="Nehalem", policy="require"))
    assert main(["cpu", "compare", "--domain", wants, "host-b"]) == Exit.OK
    assert main(["cpu", "compare", "--domain", wants, "host-b", "host-c"]) == Exit.REFUSED
    shown = capsys.readouterr().out
    assert "web2: CPU model Nehalem, 3 features (those of Nehalem on host-b, 1 with and 0 without)" in shown
    assert ["host-c", "1", "avx2"] in [line.split() for line in shown.splitlines()]
    without = domain(tmp_path, CUSTOM.format(model="Haswell", policy="disable"))
    assert main(["cpu", "compare", "--domain", without, "host-c", "host-a", "--json"]) == Exit.OK
    assert json.loads(capsys.readouterr().out) == {
        "guest": "web2",
        "model": "Haswell",
        "features": ["avx", "pni", "sse2"],
        "lacking": {"host-c": [], "host-a": []},
    }


def test_a_model_of_a_libvirt_guest_comes_from_a_file_where_one_is_named(
    three: Agents, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "map.xml").write_bytes(OLD)
    old = domain(tmp_path, "<cpu check='partial'><model>Old</model></cpu>")
    assert main(["cpu", "compare", "--domain", old, "host-a"]) == Exit.USAGE
    assert "which none of the hosts has; --file" in capsys.readouterr().err
    words = ["cpu", "compare", "--domain", old, "host-a", "--file", str(tmp_path / "map.xml")]
    assert main(words) == Exit.REFUSED
    shown = capsys.readouterr().out
    assert "those of Old of --file" in shown
    assert "dump the XML of the guest while it runs" in shown


@pytest.mark.parametrize(
    ("cpu", "words"),
    [
        ("<cpu mode='host-passthrough'/>", "`vmferry check` asks the guest itself"),
        ("<cpu><model>a b</model></cpu>", "--domain: 'a b' is no name of a model"),
        ("", "--domain: the guest has no <cpu>"),
    ],
)
def test_a_libvirt_guest_whose_cpu_is_not_told_is_an_error(
    three: Agents, capsys: pytest.CaptureFixture[str], tmp_path: Path, cpu: str, words: str
) -> None:
    assert main(["cpu", "compare", "--domain", domain(tmp_path, cpu), "host-a"]) == Exit.USAGE
    assert words in capsys.readouterr().err


def test_options_of_compare_that_do_not_go_together_are_wrong_usage(three: Agents, tmp_path: Path) -> None:
    xml = domain(tmp_path, "<cpu/>")
    assert main(["cpu", "compare", "host-a", "--domain", xml, "--guest", "vm1"]) == Exit.USAGE
    assert main(["cpu", "compare", "host-a", "host-b", "--file", xml]) == Exit.USAGE


def test_the_baseline_names_the_model_and_the_host_that_costs_more(
    three: Agents, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cpu", "baseline", "host-a", "host-b", "host-c"]) == Exit.OK
    shown = capsys.readouterr().out
    assert "largest model   Nehalem" in shown
    assert "Haswell,-avx2 (3 features)" in shown
    assert "CPUs of AuthenticAMD and GenuineIntel" in shown
    assert ["host-c", "avx2", "Haswell"] in [line.split() for line in shown.splitlines()]
    assert main(["cpu", "baseline", "host-a", "host-b", "--json"]) == Exit.OK
    assert json.loads(capsys.readouterr().out)["baseline"]["models"] == ["Haswell"]


def test_no_model_in_common_is_a_refusal(agents: Agents) -> None:
    agents.hosts["host-a"] = host("host-a", LARGE)
    agents.hosts["host-b"] = host("host-b", SMALL)
    assert main(["cpu", "baseline", "host-a", "host-b"]) == Exit.REFUSED


def test_hosts_without_a_hypervisor_in_common_are_a_usage_error(agents: Agents) -> None:
    agents.hosts["host-a"] = host("host-a", SMALL)
    agents.hosts["host-b"] = host("host-b", SMALL, hypervisor="other")
    assert main(["cpu", "baseline", "host-a", "host-b", "--hypervisor", "qemu"]) == Exit.USAGE
    # The embedded one is left.
    assert main(["cpu", "baseline", "host-a", "host-b"]) == Exit.OK


def test_a_host_that_does_not_answer_is_said(agents: Agents) -> None:
    agents.hosts["host-a"] = None
    assert main(["cpu", "show", "host-a"]) == Exit.UNREACHABLE


def test_models_of_files_are_shown_and_are_candidates(
    three: Agents, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x86_Old.xml").write_bytes(OLD)
    (tmp_path / "x86_New.xml").write_bytes(NEW)
    (tmp_path / "cpu-x86_64.conf").write_bytes(CPUDEF)
    assert main(["cpu", "show", "--file", str(tmp_path)]) == Exit.OK
    shown = capsys.readouterr().out
    assert [line.split()[0] for line in shown.splitlines()] == ["MODEL", "Nehalem", "New", "Old", "Two"]
    small = tmp_path / "small.xml"
    small.write_text("<cpus><model name='Tiny'><feature name='sse3'/></model></cpus>")
    assert (
        main(["cpu", "baseline", "host-a", "--file", str(small), "--file", str(tmp_path / "x86_Old.xml")])
        == Exit.OK
    )
    shown = capsys.readouterr().out
    assert ["Tiny", "1", "all", "hosts"] in [line.split() for line in shown.splitlines()]
    assert "host-a lacks lahf-lm pclmulqdq sse4.1" in shown


def test_files_that_are_not_read_are_usage_errors(agents: Agents, tmp_path: Path) -> None:
    bad = tmp_path / "bad.xml"
    bad.write_text("<!DOCTYPE a><cpus/>")
    empty = tmp_path / "empty"
    empty.mkdir()
    for words in (["--file", str(bad)], ["--file", str(empty)], [], ["host-a", "--file", str(bad)]):
        assert main(["cpu", "show", *words]) == Exit.USAGE
