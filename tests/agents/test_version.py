from __future__ import annotations

import tomllib
from pathlib import Path

from agents.version import VERSION


def test_the_version_is_the_projects() -> None:
    pyproject = Path(__file__).resolve().parents[2] / "pyproject.toml"
    assert tomllib.loads(pyproject.read_text())["project"]["version"] == VERSION
