"""[storage.etcd] of the agent's configuration.

Law: as in `agents.config`: every mistake is reported, by its key, and nothing is connected to.
"""

from __future__ import annotations

import re
import ssl
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from agents.errors import SettingsError
from agents.ownership.place import EtcdPlace
from agents.sections import Section, duration, listed, paths, text

__all__ = ["etcd_place"]

# Each may take the whole timeout while a guest stands still; etcd's clusters have 3, 5 or 7 members.
MAX_ENDPOINTS: Final = 9
_PREFIX: Final = re.compile(r"(/[A-Za-z0-9][A-Za-z0-9._-]{0,62}){1,4}", re.ASCII)


def etcd_place(storage: Section, base: Path) -> EtcdPlace | None:
    """Read [storage.etcd]; None: there is none."""
    is_used = "etcd" in storage
    section = storage.section("etcd")
    if not is_used:
        return None
    none: tuple[str, ...] = ()
    place = EtcdPlace(
        endpoints=section.required("endpoints", _urls, none),
        prefix=section.optional("prefix", _prefix, "/vmferry"),
        timeout_s=section.optional("timeout", duration(0.05, 10.0), 2.0),
        ca=section.optional("ca", paths(base), None),
        certificate=section.optional("certificate", paths(base), None),
        key=section.optional("key", paths(base), None),
    )
    if any(url.startswith("http:") for url in place.endpoints) and (
        place.ca or place.certificate or place.key
    ):
        section.note("endpoints", "are http, where no certificate is looked at; use https")
    _note_certificates(section, place)
    section.finish()
    return place


def _note_certificates(section: Section, place: EtcdPlace) -> None:
    if (place.certificate is None) != (place.key is None):
        present, absent = ("certificate", "key") if place.key is None else ("key", "certificate")
        section.note(absent, f"is missing beside {present}")
        return
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if place.ca is not None:
        try:
            context.load_verify_locations(place.ca)
        except (ssl.SSLError, OSError) as exc:
            section.note("ca", f"{place.ca} cannot be loaded: {exc.strerror or exc}")
    if place.certificate is not None and place.key is not None:
        try:
            # A key with a pass phrase would ask the terminal for it.
            context.load_cert_chain(place.certificate, place.key, password=lambda: "")
        except (ssl.SSLError, OSError) as exc:
            section.note(
                "certificate", f"{place.certificate} and its key cannot be loaded: {exc.strerror or exc}"
            )


def _urls(value: object) -> tuple[str, ...]:
    urls = listed(_url)(value)
    if not 0 < len(urls) <= MAX_ENDPOINTS:
        raise SettingsError(f"must be 1 to {MAX_ENDPOINTS} URLs, not {len(urls)}")
    if len(set(urls)) < len(urls):
        raise SettingsError("names one twice")
    if len({urlsplit(url).scheme for url in urls}) > 1:
        raise SettingsError("must be all https or all http")
    return urls


def _url(value: object) -> str:
    words = text(value)
    wrong = SettingsError(f"{words!r} is no URL of an etcd, as in https://etcd-1.example:2379")
    try:
        parts = urlsplit(words)
        port = parts.port
    except ValueError as exc:
        raise wrong from exc
    is_plain = parts.path in ("", "/") and not (
        parts.query or parts.fragment or parts.username or parts.password
    )
    if parts.scheme not in ("http", "https") or not parts.hostname or not port or not is_plain:
        raise wrong
    return words.rstrip("/")


def _prefix(value: object) -> str:
    words = text(value)
    if not _PREFIX.fullmatch(words):
        raise SettingsError(f"{words!r} is no prefix of keys, as in /vmferry or /site-1/vmferry")
    return words
