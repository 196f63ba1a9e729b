"""Processes that last: the host agent, hypervisor drivers, journal, metrics, command line.

Law: no decisions. What to do next is decided in `migrate`; here is who does it, where, and who may ask.
"""
