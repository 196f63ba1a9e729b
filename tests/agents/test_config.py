from __future__ import annotations

import shutil
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from agents import config, pki
from agents.config import ClientSettings, Settings, load_client_settings, load_settings
from agents.errors import ConfigInvalid
from agents.revocation import revoke
from agents.sections import Endpoint

SMALLEST = """
[agent]
name = "host-a"
[tls]
ca = "pki/ca.crt"
certificate = "pki/agent-host-a.crt"
key = "pki/agent-host-a.key"
[storage]
shared_dirs = ["shared"]
"""

CLIENT = """
[tls]
ca = "pki/ca.crt"
certificate = "pki/operator-eva.crt"
key = "pki/operator-eva.key"
[hosts.host-a]
address = "host-a.example:7700"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("config")
    pki.init_ca(folder / "pki", "test")
    pki.issue(folder / "pki", pki.Role.AGENT, "host-a")
    pki.issue(folder / "pki", pki.Role.AGENT, "host-b")
    pki.issue(folder / "pki", pki.Role.OPERATOR, "eva")
    revoke(folder / "pki", ())
    (folder / "shared").mkdir()
    # Any will do: whose they are is for etcd to judge.
    for etcd, ours in (
        ("etcd-ca.crt", "ca.crt"),
        ("etcd-client.crt", "operator-eva.crt"),
        ("etcd-client.key", "operator-eva.key"),
    ):
        shutil.copy(folder / "pki" / ours, folder / "pki" / etcd)
    return folder


@pytest.fixture
def load(folder: Path) -> Callable[[str], Settings]:
    def load_text(content: str) -> Settings:
        path = folder / "agent.toml"
        path.write_text(content)
        return load_settings(path)

    return load_text


@pytest.fixture
def problems(load: Callable[[str], Settings]) -> Callable[[str], tuple[str, ...]]:
    def problems_of(content: str) -> tuple[str, ...]:
        with pytest.raises(ConfigInvalid) as caught:
            load(content)
        return caught.value.problems

    return problems_of


def test_what_is_left_out_has_its_default(load: Callable[[str], Settings], folder: Path) -> None:
    settings = load(SMALLEST)
    assert settings.agent.listen == Endpoint("0.0.0.0", 7700)
    assert settings.agent.event_loop is config.EventLoop.ASYNCIO
    assert settings.tls.key == folder / "pki" / "agent-host-a.key"
    assert settings.shared_dirs == (folder / "shared",)
    assert settings.shared_devices == ()
    assert settings.network_disks == ()
    assert settings.libvirt == ""
    assert settings.embedded is None
    assert dict(settings.peers) == {}
    assert 1 <= settings.limits.connections <= 4
    assert settings.limits.window_bytes == 4 << 20
    assert settings.limits.bandwidth_bytes_per_s is None
    assert (settings.defaults.downtime_limit_s, settings.defaults.timeout_s) == (0.3, 0.0)
    assert settings.defaults.on_timeout is config.OnTimeout.ABORT


@pytest.fixture
def has_qemu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default binary counts as one that can be executed, also where no QEMU is."""
    monkeypatch.setattr("os.access", lambda path, mode: True)


def documented_agent_file() -> str:
    """The first TOML block of the page that operators read."""
    page = Path(__file__).parents[2] / "docs" / "configuration.md"
    return page.read_text().split("```toml\n")[1].split("```")[0]


@pytest.mark.usefixtures("has_qemu")
def test_the_documented_file_is_a_file_that_loads(load: Callable[[str], Settings]) -> None:
    settings = load(documented_agent_file().replace("/srv/guests", "shared"))
    assert settings.peers == {"host-b": Endpoint("host-b.example", 7700)}
    assert settings.embedded is not None
    assert settings.embedded.memory_limit_bytes == 8 << 30
    assert settings.qemu is not None
    assert settings.qemu.memory_limit_bytes == 64 << 30


@pytest.mark.usefixtures("has_qemu")
def test_the_documented_defaults_are_the_defaults(load: Callable[[str], Settings]) -> None:
    content = tomllib.loads(documented_agent_file())
    lines = [SMALLEST.replace("[storage]", "[guests.embedded]\n[guests.qemu]\n[storage]")]
    shortest = load("\n".join(lines))
    spelled = load(documented_agent_file().replace("/srv/guests", "shared"))
    assert spelled.agent == shortest.agent
    assert spelled.defaults == shortest.defaults
    assert content["limits"]["connections"] == 2
    # Connections depend on the host.
    assert replace(spelled.limits, connections=1) == replace(shortest.limits, connections=1)
    assert spelled.embedded is not None
    assert shortest.embedded is not None
    assert spelled.embedded.dir == shortest.embedded.dir
    assert spelled.qemu is not None
    assert shortest.qemu is not None
    assert replace(spelled.qemu, memory_limit_bytes=None) == shortest.qemu


def test_every_mistake_is_said_at_once(problems: Callable[[str], tuple[str, ...]]) -> None:
    found = problems(
        """
        [agent]
        name = "Host A"
        listen = "nowhere"
        metrics_listen = "0.0.0.0:7702"
        event_loop = "twisted"
        [tsl]
        [peers.host-b]
        adress = "host-b:7700"
        [storage]
        shared_dirs = ["/nowhere/at/all"]
        shared_devices = ["/dev/mapper/*", "/srv/*", "/dev/../*"]
        network_disks = ["nbd://store1:10809/*", "rbd:pool/*"]
        libvirt = "--help"
        [limits]
        outgoing = 0
        window = "64MiB1"
        bandwidth = 1.5
        [defaults]
        downtime_limit = 300
        """
    )
    keys = [problem.split(":")[0] for problem in found]
    assert keys == [
        "agent.listen",
        "agent.metrics_listen",
        "agent.event_loop",
        "agent.name",
        "tls.ca",
        "tls.certificate",
        "tls.key",
        "peers.host-b.address",
        "peers.host-b.adress",
        "storage.shared_dirs",
        "storage.shared_devices",
        "storage.shared_devices",
        "storage.network_disks",
        "storage.libvirt",
        "limits.outgoing",
        "limits.window",
        "limits.bandwidth",
        "defaults.downtime_limit",
        "tsl",
    ]


def test_the_message_has_the_file_and_each_mistake_on_a_line(folder: Path) -> None:
    path = folder / "two.toml"
    path.write_text(SMALLEST + "[limits]\nin = 1\nout = 2\n")
    with pytest.raises(ConfigInvalid) as caught:
        load_settings(path)
    first, *rest = str(caught.value).splitlines()
    assert (first, len(rest)) == (f"{path}: 2 mistakes", 2)


def test_a_certificate_of_another_host_is_a_mistake(problems: Callable[[str], tuple[str, ...]]) -> None:
    found = problems(SMALLEST.replace('name = "host-a"', 'name = "host-b"'))
    assert len(found) == 1
    assert "is for agent/host-a, but the configured name is 'host-b'" in found[0]


def test_a_host_is_not_its_own_peer(problems: Callable[[str], tuple[str, ...]]) -> None:
    found = problems(SMALLEST + '[peers.host-a]\naddress = "host-a:7700"\n')
    assert found == ("peers.host-a: is this host itself; list the others only",)


def test_an_empty_list_of_shared_directories_is_a_mistake(problems: Callable[[str], tuple[str, ...]]) -> None:
    found = problems(SMALLEST.replace('["shared"]', "[]"))
    assert "no guest's owner can be decided" in found[0]


def test_two_listeners_on_one_port_are_a_mistake(problems: Callable[[str], tuple[str, ...]]) -> None:
    found = problems(SMALLEST.replace("[tls]", 'data_listen = "0.0.0.0:7702"\n[tls]'))
    assert found == (
        "agent.metrics_listen: 127.0.0.1:7702 cannot be listened on beside data_listen = 0.0.0.0:7702",
    )


def test_ports_that_the_system_chooses_do_not_collide(load: Callable[[str], Settings]) -> None:
    ports = 'listen = "127.0.0.1:0"\ndata_listen = "127.0.0.1:0"\nmetrics_listen = "127.0.0.1:0"\n'
    assert load(SMALLEST.replace("[tls]", ports + "[tls]")).agent.listen.port == 0


@pytest.mark.parametrize(
    ("line", "is_right"),
    [
        ('window = "2MiB"', True),
        (f"window = {(2 << 20) - 1}", False),
        ('window = "64MiB"', True),
        (f"window = {(64 << 20) + 1}", False),
        ("connections = 16", True),
        ("connections = 17", False),
        ("outgoing = 64", True),
        ("incoming = 65", False),
        ('dead_peer = "1s"', True),
        ('dead_peer = "999ms"', False),
        ('outage = "1d"', True),
        ('outage = "86401s"', False),
        ("memory_overcommit = 16", True),
        ("memory_overcommit = 16.1", False),
        ("memory_overcommit = 0.09", False),
        ("memory_overcommit = nan", False),
        ("cpu_overcommit = 100.0", True),
        ("cpu_overcommit = 101", False),
        ("cpu_overcommit = -inf", False),
    ],
)
def test_limits_have_limits(load: Callable[[str], Settings], line: str, is_right: bool) -> None:
    content = f"{SMALLEST}[limits]\n{line}\n"
    if is_right:
        load(content)
    else:
        with pytest.raises(ConfigInvalid, match="must be between"):
            load(content)


def test_settings_cannot_be_changed(load: Callable[[str], Settings]) -> None:
    settings = load(SMALLEST)
    with pytest.raises(TypeError):
        settings.peers["host-c"] = Endpoint("c", 1)  # type: ignore[index]


def client(folder: Path, content: str) -> ClientSettings:
    path = folder / "client.toml"
    path.write_text(content)
    return load_client_settings(path)


def test_a_client_knows_its_hosts(folder: Path) -> None:
    assert client(folder, CLIENT).hosts == {"host-a": Endpoint("host-a.example", 7700)}


def test_a_client_with_an_agents_certificate_is_told_so(folder: Path) -> None:
    with pytest.raises(ConfigInvalid, match="is for an agent, and an operator is needed"):
        client(folder, CLIENT.replace("operator-eva", "agent-host-a"))


def test_a_client_without_hosts_is_told_how_to_name_one(folder: Path) -> None:
    with pytest.raises(ConfigInvalid, match=r"\[hosts\.host-a\] address"):
        client(folder, CLIENT.split("[hosts", maxsplit=1)[0])


def test_the_variable_names_the_clients_file(folder: Path) -> None:
    client(folder, CLIENT)
    loaded = load_client_settings(environ={"VMFERRY_CONFIG": str(folder / "client.toml")})
    assert "host-a" in loaded.hosts


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"VMFERRY_CONFIG": "/x.toml", "HOME": "/home/eva"}, "/x.toml"),
        ({"XDG_CONFIG_HOME": "/xdg", "HOME": "/home/eva"}, "/xdg/vmferry/client.toml"),
        ({"HOME": "/home/eva"}, "/home/eva/.config/vmferry/client.toml"),
    ],
)
def test_the_clients_file_is_found_as_other_programs_find_theirs(
    environ: dict[str, str], expected: str
) -> None:
    assert config.client_config_path(environ) == Path(expected)


def test_a_missing_file_is_one_problem_with_its_path(tmp_path: Path) -> None:
    path = tmp_path / "none.toml"
    with pytest.raises(ConfigInvalid) as caught:
        load_client_settings(path)
    assert str(caught.value) == f"{path}: cannot be read: No such file or directory"


def test_without_allow_there_is_no_rule(load: Callable[[str], Settings]) -> None:
    assert load(SMALLEST).access.rules == ()
    rule = load(SMALLEST + '[[allow]]\nagents = ["host-?"]\nmay = ["send-guests"]\n').access.rules[0]
    assert (rule.key, rule.names, rule.guests) == ("allow[0]", ("host-?",), ("*",))


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ('may = ["view"]', "name either operators or agents"),
        ('operators = ["*"]\nagents = ["*"]\nmay = ["view"]', "name either operators or agents"),
        ('operators = ["*"]', "may"),
        ('operators = []\nmay = ["view"]', "about nobody"),
        ('operators = ["Eva!"]\nmay = ["view"]', "is no name"),
        ('agents = ["*"]\nmay = ["move"]', "agents may not move"),
        ('operators = ["*"]\nmay = ["send-guests"]', "operators may not send-guests"),
        ('operators = ["*"]\nmay = ["fly"]', "fly"),
        ('operators = ["*"]\nmay = ["view"]\nguests = ["[ab]"]', "is no guest"),
        ('operators = ["*"]\nmay = ["view"]\ncolour = "red"', "colour"),
    ],
)
def test_a_rule_that_is_not_one_is_named(
    problems: Callable[[str], tuple[str, ...]], lines: str, said: str
) -> None:
    found = problems(f"{SMALLEST}[[allow]]\n{lines}\n")
    assert any("allow[0]" in problem and said in problem for problem in found), found


@pytest.mark.parametrize("content", [SMALLEST, CLIENT])
def test_a_list_of_revoked_certificates_is_read_at_the_start(folder: Path, content: str) -> None:
    path = folder / "with_list.toml"
    load = load_settings if content is SMALLEST else load_client_settings
    path.write_text(content.replace("[tls]", '[tls]\ncrl = "pki/ca.crl"'))
    assert load(path).tls.crl == folder / "pki" / "ca.crl"
    path.write_text(content.replace("[tls]", '[tls]\ncrl = "pki/none.crl"'))
    with pytest.raises(ConfigInvalid, match=r"tls\.crl: cannot read .*none\.crl"):
        load(path)


ETCD = SMALLEST + '[storage.etcd]\nendpoints = ["https://etcd-1:2379"]\n'


def test_etcd_is_not_used_unless_it_is_named(load: Callable[[str], Settings], folder: Path) -> None:
    assert load(SMALLEST).etcd is None
    etcd = load(ETCD + 'ca = "pki/ca.crt"\n').etcd
    assert etcd is not None
    assert (etcd.prefix, etcd.timeout_s, etcd.ca) == ("/vmferry", 2.0, folder / "pki" / "ca.crt")
    assert (etcd.certificate, etcd.key) == (None, None)


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("endpoints = []", "endpoints"),
        ('endpoints = "https://etcd-1:2379"', "endpoints"),
        ('endpoints = ["etcd-1:2379"]', "endpoints"),
        ('endpoints = ["https://etcd-1"]', "endpoints"),
        ('endpoints = ["https://etcd-1:2379/v3"]', "endpoints"),
        ('endpoints = ["https://root:secret@etcd-1:2379"]', "endpoints"),
        ('endpoints = ["https://[::1:2379"]', "endpoints"),
        ('endpoints = ["https://a:1", "https://a:1/"]', "endpoints"),
        ('endpoints = ["https://a:1", "http://b:1"]', "endpoints"),
        ('endpoints = ["http://a:1"]\nca = "pki/ca.crt"', "endpoints"),
        (f"endpoints = {[f'https://e:{n}' for n in range(1, 11)]}", "endpoints"),
        ('endpoints = ["https://a:1"]\nprefix = "vmferry"', "prefix"),
        ('endpoints = ["https://a:1"]\nprefix = "/a/../b"', "prefix"),
        ('endpoints = ["https://a:1"]\nprefix = "/a#b"', "prefix"),
        ('endpoints = ["https://a:1"]\ntimeout = "11s"', "timeout"),
        ('endpoints = ["https://a:1"]\nca = "nowhere.crt"', "ca"),
        ('endpoints = ["https://a:1"]\nkey = "pki/etcd-client.key"', "certificate"),
        ('endpoints = ["https://a:1"]\ncertificate = "pki/etcd-client.crt"', "key"),
        (
            'endpoints = ["https://a:1"]\ncertificate = "pki/etcd-ca.crt"\nkey = "pki/etcd-client.key"',
            "certificate",
        ),
        ('prefix = "/a"', "endpoints"),
        ('endpoints = ["https://a:1"]\nprefx = "/a"', "prefx"),
    ],
)
def test_mistakes_about_etcd_are_said_by_their_key(
    problems: Callable[[str], tuple[str, ...]], line: str, key: str
) -> None:
    (problem,) = problems(SMALLEST + f"[storage.etcd]\n{line}\n")
    assert problem.startswith(f"storage.etcd.{key}: ")
