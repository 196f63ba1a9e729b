"""Every number that a peer can reach, each with its reason.

Law: numbers, and no behaviour beyond arithmetic on them. A limit that a peer can reach and that does not stand
here is a mistake.
"""

from __future__ import annotations

from typing import Final

KIB: Final = 1 << 10
MIB: Final = 1 << 20

# --- data plane ---------------------------------------------------------------------------------------------

# Data of one payload: 1 MiB. 256 KiB to 1 MiB cost the same CPU per byte, 64 KiB costs 7-20 % more, 4 MiB gains
# nothing (AES-256-GCM and zstd 1 over loopback, 2 vCPUs).
MAX_PAYLOAD_DATA_BYTES: Final = MIB
# Tables and headers of whoever makes the payload: 64 KiB hold 5461 entries of 12 bytes.
MAX_PAYLOAD_TABLE_BYTES: Final = 64 * KIB
MAX_PAYLOAD_BYTES: Final = MAX_PAYLOAD_DATA_BYTES + MAX_PAYLOAD_TABLE_BYTES
# A whole record: header and tag on top. A receiver allocates two buffers of this size per connection.
MAX_RECORD_BYTES: Final = MAX_PAYLOAD_BYTES + 32

# Sealed but not yet acknowledged bytes of one migration. 4 MiB keep 2 connections of 1 MiB records busy (one
# record at each end of each connection), and carry 1 Gbit/s over 30 ms of round trip.
WINDOW_BYTES: Final = 4 * MIB

# The largest window that a peer may ask for: 1 Gbit/s over half a second of round trip.
MAX_WINDOW_BYTES: Final = 64 * MIB


def span_records(window_bytes: int) -> int:
    """How far the newest record may be ahead of the oldest that is not applied, at both ends.

    One for each KiB of the window, 4096 at the default: bounds the receiver's set of claimed numbers (under
    512 KiB then), whatever a peer sends. A sender stops 4 GiB ahead of one lost 1 MiB record.
    """
    return max(256, window_bytes // KIB)


# Keys change after so many records: 2^18 records of 1 MiB are 2^34 AES blocks under one key, which keeps an
# attacker's advantage against AES-GCM below 2^-58 (blocks^2 / 2^127), better than the bound of RFC 8446, 5.5.
RECORDS_PER_KEY: Final = 1 << 18
# No sequence number at or above this exists: 2^48 records would take 9 years at 1 million records/s. The nonce
# has 64 bits for it, so it can never wrap.
MAX_RECORDS: Final = 1 << 48

MAX_CONNECTIONS: Final = 64  # data connections of one migration: more than cores that compress gain nothing

# --- accepting ----------------------------------------------------------------------------------------------

# An honest TLS or data handshake takes two round trips: 5 s pass even on a link that loses packets.
HANDSHAKE_TIMEOUT_S: Final = 5.0
# Connections that have not yet proved who they are. Each costs a task and about 50 KiB while it lasts.
MAX_PENDING_HANDSHAKES: Final = 64

# --- control ------------------------------------------------------------------------------------------------

# The longest answers: a list of all jobs, and hashes of pages (2 MiB). Device state travels with the pages.
MAX_MESSAGE_BYTES: Final = 20 * MIB
# What an agent takes in one request of a peer, which may begin one on each of its 128 connections and never end it. The
# longest are a guest's facts with its hypervisor's description, tens of KiB, and 16 KiB of digests.
MAX_REQUEST_BYTES: Final = MIB
MAX_DEPTH: Final = 12  # containers in containers; our deepest message has 6
# Values in one message, all containers together: bounds what decoding builds (100 thousand small objects, under
# 16 MiB) where the byte limit alone would let 20 MiB of empty lists grow to more than 1 GiB.
MAX_ITEMS: Final = 100_000
MAX_TEXT_BYTES: Final = 256 * KIB  # one string; a preflight report in JSON is the longest, about 20 KiB
# A server that works on a request says so this often: whoever hears nothing for longer than it bears is not heard
# either. The configuration takes no bound for dead peers below MIN_DEAD_PEER_S.
WORKING_EVERY_S: Final = 0.4
MIN_DEAD_PEER_S: Final = 1.0
# Sessions that an agent remembers; each keeps its last reply. Of one peer as many as guests may come at once (64), and
# of all four times that: no peer alone shuts the others out.
MAX_SESSIONS: Final = 256
MAX_SESSIONS_PER_OWNER: Final = 64
# A guest's name and its identity, as a peer gives them: our own have 63 and 36. They are kept with a job and stand in
# every list of jobs, which must fit into one message.
MAX_GUEST_NAME_CHARS: Final = 255
MAX_REFUSAL_TEXT_BYTES: Final = 2048  # a refusal before the schema is spoken: one sentence

# --- measuring a path ---------------------------------------------------------------------------------------

# A measurement of the data path ends after a second or a GiB, whichever comes first. A second is 50 round trips of
# 20 ms: TCP has opened its window long before. A GiB is what 8.6 Gbit/s carry in a second: a link of 100 Gbit/s is
# taken for 0.1 s at most.
MEASURE_S: Final = 1.0
MEASURE_BYTES: Final = 1 << 30
# What a destination lends a source for it, all at once: 16 connections hold 34 MiB of buffers (two records each), and
# more than 16 carry no more.
MEASURE_CONNECTIONS: Final = 16
# Measurements that a destination takes part in at once: two would halve each other's figure, and the link's owners have
# agreed to one.
MEASURES_AT_ONCE: Final = 1
# The destination ends it after so long, whatever the source does: the second itself, and a slow handshake before.
MEASURE_ENDS_S: Final = MEASURE_S + HANDSHAKE_TIMEOUT_S
