"""QEMU guests moved by QEMU itself and by vmferry, side by side: what `bench.run_qemu` is made of.

Law: both ways start from the same saved guest, by the same arguments; what is measured is measured for both by the same
code. `links` makes networks, `source` guests, `native` and `direct` are the two ways, `worker` takes turns.
"""
