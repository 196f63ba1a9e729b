"""What an agent sees of its own host for the preflight, whatever the hypervisor: a module for each area of facts.

Law: reads the host, changes nothing, judges nothing; `migrate.preflight` does.
"""
