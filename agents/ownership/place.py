"""Where ownership records in etcd are: what a configuration says of it, and how a place there is told from a directory.

Law: no connection, and nothing that makes one: hosts without an etcd load this as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = ["ETCD", "EtcdPlace"]

# Every directory begins with a slash.
ETCD: Final = "etcd:"


@dataclass(frozen=True, slots=True, kw_only=True)
class EtcdPlace:
    """Where an etcd is and how it is asked. `endpoints` are URLs; `timeout_s` is for each of them.

    Without `ca` the system's certificate authorities are believed; without `certificate` none is shown.
    """

    endpoints: tuple[str, ...]
    prefix: str
    timeout_s: float
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
