"""Stock QEMU guests in direct mode: the engine owns their RAM, QEMU carries only its device state.

Law: the driver behind `migrate.ports.Hypervisor`. RAM is mapped from the guest's process, its dirty log is the kernel's
(taken with one injected system call), and QEMU's own migration runs with x-ignore-shared, through a socket that ends in
this agent. Nothing here depends on the accelerator: KVM and TCG are the same to it.
"""
