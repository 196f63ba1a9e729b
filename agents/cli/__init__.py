"""The command line: one module for each group of verbs.

Law: a command reads its options, calls one coroutine or function of `agents`, and prints. What it prints for
people goes through `output`; `--json` prints one value for programs; which exit code an error has is decided
in `output` alone. Modules of commands are imported when they are used (see `main.COMMANDS`).
"""
