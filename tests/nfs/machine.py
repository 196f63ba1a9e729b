"""The NFS server and its clients: a machine with Linux's own, in which `tests.nfs.inside` runs."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Final

from agents.testguest.image import find_kernel
from tests.machine import run_in_machine
from tests.needs import need_program
from tests.nfs.inside import Fault

__all__ = ["results_of"]

SERVER: Final = ("exportfs", "rpc.nfsd", "rpc.mountd")
DRIVERS: Final = ("nfsd", "nfsv4")
RAM_MIB: Final = 1536
# The race, and each fault.
RESULTS: Final = 1 + len(Fault)
# Nobody asks for locks or for version 3.
_SCRIPT: Final = """
mkdir -p /var/lib/nfs/v4recovery /srv/export /mnt/a /mnt/b /mnt/c
touch /var/lib/nfs/etab /var/lib/nfs/rmtab
echo "/srv/export 127.0.0.1(rw,fsid=0,no_subtree_check,no_root_squash,sync)" > /etc/exports
mount -t tmpfs tmpfs /srv/export
mount -t nfsd nfsd /proc/fs/nfsd
exportfs -a
rpc.mountd -N 2 -N 3
rpc.nfsd -N 3 4
echo Y > /proc/fs/nfsd/v4_end_grace
common=vers=4.2,addr=127.0.0.1,clientaddr=127.0.0.1,nosharecache,retrans=1
mount -i -t nfs4 -o $common,hard,timeo=20 127.0.0.1:/ /mnt/a || exit
mount -i -t nfs4 -o $common,soft,timeo=5 127.0.0.1:/ /mnt/b || exit
mount -i -t nfs4 -o $common,hard,timeo=5 127.0.0.1:/ /mnt/c || exit
{python} -m tests.nfs.inside {every}
"""


def results_of(folder: Path, *, every: int, timeout_s: float) -> list[dict[str, object]]:
    """Run the program with one operation in `every`, and give what it found.

    Raises:
        NotHere: a tool is missing.
    """
    for program in SERVER:
        need_program(program)
    outcome = run_in_machine(
        _SCRIPT.format(python=sys.executable, every=every),
        find_kernel(),
        folder,
        drivers=DRIVERS,
        ram_mib=RAM_MIB,
        within_s=timeout_s,
    )
    found = [json.loads(line) for line in re.findall(r"^RESULT (\{.*\})$", outcome.printed, re.MULTILINE)]
    if len(found) < RESULTS:
        raise AssertionError(f"the program broke off: {outcome.printed[-3000:]}")
    return found
