"""The host agent: what runs as long as the host does.

Law: it owns sockets, jobs and journals, and decides nothing about a migration. Modules and their tasks:

    agent      assembles the rest; the task group of everything; drain on SIGTERM
    control    the control listener: one task per channel, ended by its peer, a deadline or the agent
    data       the data listener: one task per connection, ended with its migration
    jobs       the table of migrations, running and ended; no task
    path       measures the way to a destination for a check; tasks end before its calls do
    measurements   takes part in sources' measurements: one at a time, one task each that ends it in time
    outgoing   one task per outgoing migration, ended by itself or by the agent's drain
    incoming   sessions of incoming migrations; one task that watches for silent sources
    recovery   what a restart finds in the journals; runs before the listeners
"""
