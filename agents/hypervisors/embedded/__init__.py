"""The embedded guest: a small x86-64 machine in a process of its own, and the driver for it.

Law: deterministic by instruction count. Nothing that a guest can see depends on time, on the host or on how
its instructions were sliced, so a guest that was moved can be compared with one that never was, to the byte.

The guest's process: `process` (pace, state) serves `control` (the socket) around a `machine` (CPU, RAM,
`devices`) that runs `program` (machine code) as `spec` says. The agent's side: `driver`, with `tracking`.
"""
