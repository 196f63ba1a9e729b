"""URLs of network disks: what QEMU is told of each, and which can be no disk of a guest."""

from __future__ import annotations

import pytest

from agents.hypervisors.qemu.netdisks import problem_of, take_url, url_of_filename, words_of
from agents.storageproof.urls import parse

WORDS = {
    "nbd://[fd00::1]:10809/web1": {
        "server.type": "inet",
        "server.host": "fd00::1",
        "server.port": "10809",
        "export": "web1",
    },
    "iscsi://[fd00::1]:3260/iqn.2026-01.example:web1/7": {
        "transport": "tcp",
        "portal": "[fd00::1]:3260",
        "target": "iqn.2026-01.example:web1",
        "lun": "7",
    },
    "nfs://store1:2049/guests/web1": {
        "server.type": "inet",
        "server.host": "store1",
        "path": "/guests/web1",
    },
    "gluster://[fd00::1]:24007/guests/tenant/web1.raw": {
        "volume": "guests",
        "path": "tenant/web1.raw",
        "server.0.type": "inet",
        "server.0.host": "fd00::1",
        "server.0.port": "24007",
    },
    "rbd://[fd00::1]:3300/guests/web1": {
        "pool": "guests",
        "image": "web1",
        "server.0.host": "fd00::1",
        "server.0.port": "3300",
    },
    "rbd://vm@mon1:6789/guests/tenant/web1": {
        "pool": "guests",
        "namespace": "tenant",
        "image": "web1",
        "user": "vm",
        "server.0.host": "mon1",
        "server.0.port": "6789",
    },
    "https://store1:443/a/install.iso": {"url": "https://store1:443/a/install.iso"},
}

MONITOR = '"server": [{"host": "m", "port": "3300"}]'


@pytest.mark.parametrize("url", WORDS)
def test_a_url_and_its_words_are_one(url: str) -> None:
    place = parse(url)
    assert place is not None
    assert problem_of(url, is_read_only=True) is None
    assert words_of(place) == WORDS[url]
    fields = {f"file.{name}": word for name, word in WORDS[url].items()} | {"file.other": "stays"}
    assert take_url(place.scheme, fields) == url
    assert fields == {"file.other": "stays"}


@pytest.mark.parametrize(
    ("name", "url"),
    [
        (
            'json:{"driver": "raw", "file": {"lun": "1", "portal": "s:3260", "driver": "iscsi", "transport": "tcp", '
            '"target": "iqn.a"}}',
            "iscsi://s:3260/iqn.a/1",
        ),
        (
            'json:{"driver": "nbd", "export": "a", "server": {"type": "inet", "host": "::1", "port": "10809"}}',
            "nbd://[::1]:10809/a",
        ),
        ("nfs://store1/guests/a", "nfs://store1:2049/guests/a"),
        ("gluster://store1/guests/a", "gluster://store1:24007/guests/a"),
        (
            'json:{"driver": "raw", "file": {"server.0.host": "s", "driver": "gluster", "path": "b/a", "volume": "v", '
            '"server.0.type": "inet", "server.0.port": "24007"}}',
            "gluster://s:24007/v/b/a",
        ),
        (
            'json:{"driver": "raw", "file": {"pool": "guests", "image": "a", "driver": "rbd", "user": "vm", "server": '
            '[{"host": "mon1", "port": "3300"}]}}',
            "rbd://vm@mon1:3300/guests/a",
        ),
        (
            'json:{"driver": "rbd", "pool": "p", "image": "a", "server": [{"host": "m", "port": "3300"}, '
            '{"host": "n", "port": "3300"}]}',
            "rbd://m:3300/p/a",
        ),
        # A snapshot, and an image of another Ceph.
        *(
            (name, name)
            for more in ('"snapshot": "s"', '"conf": "/etc/ceph/other.conf"')
            for name in [f'json:{{"driver": "rbd", "pool": "p", "image": "a", {more}, {MONITOR}}}']
        ),
        *(
            (name, name)
            for name in (
                "",
                "/srv/guests/a",
                "ssh://vm@store1/srv/a",
                'json:{"driver": "gluster", "path": "a", "volume": "v", "server": [{"type": "unix", "path": "/s"}]}',
                "rbd:pool/a",
                'json:{"driver": "raw", "file": {"driver": "iscsi", "target": {"a": 1}}}',
                'json:{"driver": "raw", "file": [1]}',
                'json:{"driver": ["nbd"]}',
                "json:[",
                "json:" + "[" * 4000,
            )
        ),
    ],
)
def test_what_qemu_calls_an_image_is_a_url_where_it_is_a_network_disk(name: str, url: str) -> None:
    assert url_of_filename(name) == url


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("nbd://store1/no-port", "no URL with a port"),
        ("iscsi://me@store1:3260/iqn.a/1", "no URL with a port"),
        ("ssh://store1:22/a", "no URL with a port"),
        ("iscsi://store1:3260/iqn.a:b", "a target and a LUN"),
        ("iscsi://store1:3260/iqn.a:b/one", "a target and a LUN"),
        ("iscsi://store1:3260/iqn.a:b/c/1", "a target and a LUN"),
        ("nfs://store1:2050/guests/a", "at port 2049"),
        ("nfs://store1:2049/a", "a file of an export"),
        ("gluster://store1:24007/guests", "a volume and a file"),
        ("rbd://mon1:3300/guests", "a pool and an image"),
        ("rbd://mon1:3300/guests/a/b/c", "a pool and an image"),
        ("https://store1:443/install.iso", "read_only = true"),
    ],
)
def test_what_can_be_no_disk_of_a_guest_says_why(url: str, words: str) -> None:
    assert words in (problem_of(url, is_read_only=False) or "")
