"""What gives the payloads of a round to the connections that send them.

Law: pure; a type and a number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

__all__ = ["NOT_YET", "Producer"]

# Fills the buffer with the next payload and gives its length; 0 when there are no more, NOT_YET when there is none now.
# Called from several threads at once.
Producer = Callable[[memoryview], int]
NOT_YET: Final = -1
