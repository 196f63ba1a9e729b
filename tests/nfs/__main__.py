"""`python -m tests.nfs [EVERY]`: try every operation of a claim (or one in so many), and print what came of it."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from tests.nfs.machine import results_of

if __name__ == "__main__":
    every = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    with tempfile.TemporaryDirectory() as folder:
        for one in results_of(Path(folder), every=every, timeout_s=3600):
            print(json.dumps(one))
