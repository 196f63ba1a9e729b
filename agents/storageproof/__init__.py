"""What one end sees of a guest's disks, so that two ends can be compared: objects, contents, locks, mounts, formats.

Law: reads, and writes nothing but into probes; judges nothing, `migrate.preflight` does. Every path may be a peer's: it
is checked by `places` before it is opened. All of it blocks and belongs in `agents.ownership.threads`.

    places      what this host's configuration allows to be a disk
    probes      files with nonces beside disks: planted, read, echoed, locked
    images      what is at a disk's path
    sectors     some sectors of it, past the host's cache
    chains      the images under it
    formats     headers of images: a pure parser
    locks       locks that hold across hosts, of QEMU's kind
    mounts      which file system a file is in
    devices     what block devices say of themselves
"""
