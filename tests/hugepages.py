"""Huge pages of 2 MiB for a test, taken from the machine and given back."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

__all__ = ["huge_pages"]


class huge_pages:  # noqa: N801  # used as a statement: with huge_pages(256):
    """Reserve huge pages of 2 MiB for a test, or skip it where that cannot be done."""

    _FILE = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")

    def __init__(self, pages: int) -> None:
        self._pages = pages

    def __enter__(self) -> None:
        if not self._pages:
            return
        if not os.access(self._FILE, os.W_OK):
            pytest.skip("needs the right to reserve huge pages")
        self._before = self._FILE.read_text()
        self._FILE.write_text(str(self._pages))
        if int(self._FILE.read_text()) < self._pages:
            pytest.skip(f"needs {self._pages} huge pages, the kernel gives {self._FILE.read_text().strip()}")

    def __exit__(self, *_: object) -> None:
        if self._pages:
            self._FILE.write_text(self._before)
