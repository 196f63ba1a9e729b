"""A migration: phases, planner, preflight, ownership, and the two procedures.

Law: no hypervisor's name and no socket. Every table and every decision is pure; `source` and `destination`
are the only procedures, and they read from top to bottom.
"""
