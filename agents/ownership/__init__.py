"""Where ownership records are kept: in files beside a guest's disks, or in etcd.

Law: a store says what was made and what stands; what follows from it is `migrate.ownership`'s. A record is made
whole or not at all, by whoever is first, and never changed. No store asks a clock or a time stamp.

    fileops     small files on a storage server, durable and whole
    files       records in files
    gateway     etcd's JSON gateway: endpoints asked in turn, deadlines, certificates
    etcd        records in etcd
    threads     calls to a storage server that may hang
"""
