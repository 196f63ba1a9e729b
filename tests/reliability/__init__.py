"""Faults tried one after the other on real agents and real guests, each with what became of the guest.

Used by the tests beside it, a sample of each, and by `python -m bench faults`, all of them.
"""
