"""Every async test runs on both event loops: asyncio in debug mode, and trio.

Law: only what every package's tests need. A fixture of one package lives in that package's folder.
"""

from __future__ import annotations

import pytest


@pytest.fixture(
    params=[
        pytest.param(("asyncio", {"debug": True}), id="asyncio"),
        pytest.param(("trio", {}), id="trio"),
    ]
)
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, object]]:
    """Name an event loop and its options, for AnyIO's pytest plugin.

    Time is real on both: a test that must wait long in virtual time asks for trio's MockClock itself,
    because an autojumping clock would also jump while worker threads and sockets are busy.
    """
    backend: tuple[str, dict[str, object]] = request.param
    return backend
