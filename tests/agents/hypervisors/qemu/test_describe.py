"""What is made of QEMU's answers, where a real QEMU under test gives only one of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import pytest

from agents.hypervisors.qemu.describe import balloon_of, is_confidential
from agents.hypervisors.qemu.errors import QmpFailed
from agents.hypervisors.qemu.qmp import Json, Qmp

pytestmark = pytest.mark.anyio


class Answers:
    """A monitor with one answer."""

    def __init__(self, answer: object) -> None:
        self._answer = answer

    async def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> Json:
        if isinstance(self._answer, Exception):
            raise self._answer
        return cast(Json, self._answer)


def monitor(answer: object) -> Qmp:
    return cast(Qmp, Answers(answer))


REFUSED = QmpFailed("a command", "GenericError", "no such thing")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ({"actual": 4096}, 4096),
        ({"actual": True}, None),
        ({}, None),
        ([], None),
        (None, None),
        (REFUSED, None),
    ],
)
async def test_a_balloon_s_size_is_known_or_it_is_not(answer: object, expected: int | None) -> None:
    assert await balloon_of(monitor(answer)) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("/objects/sev0", True),
        ("/objects/tdx0", True),
        ("", False),
        (None, False),
        ({}, False),
        (REFUSED, False),
    ],
)
async def test_ram_is_encrypted_where_the_machine_has_a_link_to_what_does(
    answer: object, expected: bool
) -> None:
    assert await is_confidential(monitor(answer)) is expected
