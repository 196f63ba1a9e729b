"""Fuzzing of every parser that reads a peer's bytes, a file's or a hypervisor's: `python -m tests.fuzz`."""
