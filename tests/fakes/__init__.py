"""Fakes that stand where the world stands: each keeps the contract of what it replaces."""
