"""The version of vmferry: the one in pyproject.toml, readable where the package is not installed."""

from __future__ import annotations

from typing import Final

__all__ = ["VERSION"]

VERSION: Final = "0.1.0"
