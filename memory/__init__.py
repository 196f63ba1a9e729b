"""Guest RAM: what is in it, what changed, how pages become bytes and back.

Law: no sockets, no phases, no event loop. Everything here is called from worker threads or plain code and
works on batches of pages; nothing makes an object per page. `layout`, `runs`, `bitmap`, `cursor`, `codec` and
`digest` are pure; `ram`, `dirty`, `uffd_wp` and `soft_dirty` touch the operating system, by `linux` alone where
Python's library has no call for it.
"""
