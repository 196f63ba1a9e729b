"""An agent's process: what it loads, and what its batches allocate: no page faults, and none of it stays."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

import pytest

# In a process of its own: the settings are the process's.
PROGRAM = """
import json, resource, threading
from agents.host.footprint import before_imports, migration_ended
before_imports()
import zstandard
from memory.codec import MAX_DATA_BYTES

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def resident_bytes():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

batch = bytes(range(256)) * (MAX_DATA_BYTES // 256)
packed = zstandard.ZstdCompressor(level=1).compress(batch)
seen = {}

def work():
    decompressor = zstandard.ZstdDecompressor()
    for _ in range(8):
        decompressor.decompress(packed)
    before = faults()
    for _ in range(100):
        decompressor.decompress(packed)
    seen["faults"] = faults() - before
    before = resident_bytes()
    # As a migration's window: buffers of one record each.
    records = [bytearray(600_000) for _ in range(40)]
    seen["held_bytes"] = resident_bytes() - before
    records.clear()
    migration_ended()
    seen["left_bytes"] = resident_bytes() - before

thread = threading.Thread(target=work)
thread.start()
thread.join()
print(json.dumps(seen))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt(3) is glibc's")
def test_batches_cost_no_page_faults_and_a_migrations_buffers_go_back_to_the_kernel() -> None:
    said = subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True, timeout=60)
    figures: dict[str, int] = json.loads(said.stdout)

    # A whole batch, 100 times: each of its pages would be a fault.
    assert figures["faults"] < 1000
    assert figures["held_bytes"] > 20_000_000
    assert figures["left_bytes"] < 4_000_000


def test_an_agent_without_an_etcd_loads_nothing_that_asks_one() -> None:
    program = "import sys, agents.host.agent; print('httpx' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, timeout=60)
    assert said.stdout == b"False\n"
