"""Drivers: each makes one kind of guest look like `migrate.ports.Hypervisor`.

Law: a driver knows its hypervisor and nothing of phases, peers or policies. What a peer sent (a guest's spec,
its device state) is hostile to the driver that reads it. Drivers do not know each other.
"""
