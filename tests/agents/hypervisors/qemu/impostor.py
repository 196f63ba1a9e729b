"""A QEMU that says it is another release: the real one behind a program that changes its answers."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.agents.hypervisors.qemu.conftest import QEMU

__all__ = ["write_impostor"]

# Only a QEMU without a machine is changed, which an agent asks what there is; guests are the real one's.
_PROGRAM = """\
#!{python}
import ctypes, json, os, socket, subprocess, sys, time

PLAN = json.loads({plan!r})
argv = sys.argv[1:]
if argv == ["-L", "help"] and PLAN["data_dir"]:
    print(PLAN["data_dir"])
    sys.exit()
if not any(word.startswith("none,accel") for word in argv):
    os.execv({qemu!r}, [{qemu!r}, *argv])


def changed(message):
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
    return message


at = argv.index("-qmp") + 1
path = argv[at].removeprefix("unix:").partition(",")[0]
argv[at] = argv[at].replace(path, path + ".real")
# SIGKILL of this program must end it too: PR_SET_PDEATHSIG.
child = subprocess.Popen([{qemu!r}, *argv], preexec_fn=lambda: ctypes.CDLL(None).prctl(1, 9))
while not os.path.exists(path + ".real"):
    time.sleep(0.01)
inner = socket.socket(socket.AF_UNIX)
inner.connect(path + ".real")
server = socket.socket(socket.AF_UNIX)
server.bind(path)
server.listen()
outer = server.accept()[0]
there, here = inner.makefile("rwb"), outer.makefile("rwb")
while True:
    message = json.loads(there.readline())
    here.write(json.dumps(changed(message)).encode() + b"\\n")
    here.flush()
    if "event" not in message:
        line = here.readline()
        if not line:
            break
        there.write(line)
        there.flush()
child.kill()
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
    path.write_text(_PROGRAM.format(python=sys.executable, plan=plan, qemu=str(QEMU)))
    path.chmod(0o755)
    return path
