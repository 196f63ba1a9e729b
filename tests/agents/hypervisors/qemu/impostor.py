"""A QEMU that says it is another release: the real one behind a program that changes its answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tests.agents.hypervisors.qemu.conftest import write_between

__all__ = ["write_impostor"]

# Only a QEMU without a machine is changed, which an agent asks what there is; guests are the real one's.
_PROGRAM = """\
import json, sys

PLAN = json.loads({plan!r})
if sys.argv[1:] == ["-L", "help"] and PLAN["data_dir"]:
    print(PLAN["data_dir"])
    sys.exit()


def told(line):
    message = json.loads(line)
    answer = message.get("return")
    if isinstance(answer, dict) and "qemu" in answer:
        answer["qemu"].update(dict(zip(("major", "minor", "micro"), PLAN["version"])))
    if isinstance(answer, list):
        message["return"] = [
            one for one in answer if not isinstance(one, dict) or one.get("name") not in PLAN["hidden"]
        ]
        for one in message["return"]:
            if isinstance(one, dict) and one.get("name") in PLAN["deprecated"]:
                one["deprecated"] = True
    return json.dumps(message).encode() + b"\\n"
"""


def write_impostor(
    path: Path,
    *,
    version: tuple[int, int, int],
    hidden: Sequence[str] = (),
    deprecated: Sequence[str] = (),
    data_dir: Path | None = None,
) -> Path:
    """Write a binary that says `version`, has no machine or device of the `hidden` names, and loads from `data_dir`."""
    names = {"hidden": list(hidden), "deprecated": list(deprecated)}
    plan = json.dumps({"version": version, **names, "data_dir": str(data_dir or "")})
    return write_between(path, _PROGRAM.format(plan=plan))
