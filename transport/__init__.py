"""Bytes between two hosts: frames, sealing, flow, resume.

Law: payloads are opaque. Nothing here knows a page, a guest or a phase; nothing unauthenticated is parsed;
every number that a peer can reach stands in `limits` with its reason.
"""
