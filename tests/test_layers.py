"""The packages under test are the ones of this checkout.

Their names are common words, and another distribution in the same environment may own them; then every other
test would prove something about somebody else's code.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("package", ["agents", "bench", "memory", "migrate", "transport"])
def test_each_package_comes_from_this_repository(package: str) -> None:
    origin = importlib.import_module(package).__file__
    assert origin is not None
    assert Path(origin).resolve() == REPOSITORY / package / "__init__.py"
