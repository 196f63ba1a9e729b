"""Targets of what stands in files, batches of pages, and what QEMU says.

Law: files are made in a folder of the test's own, one that is removed at exit.
"""

from __future__ import annotations

import math
import struct
import tempfile
from pathlib import Path
from typing import Final, cast

import anyio.abc
import msgpack
import numpy as np

from agents.config import load_client_settings, load_settings
from agents.errors import ConfigInvalid, JournalCorrupt, QuantityInvalid
from agents.hypervisors.qemu.errors import QemuGone, QmpFailed
from agents.hypervisors.qemu.qmp import Qmp
from agents.journal import JournalEntry, JournalFile, read_journal
from agents.predictions import PredictionFile
from agents.storageproof.formats import MAX_NAME_BYTES, FormatInvalid, format_of, parse_qcow2
from agents.units import parse_duration, parse_rate, parse_size
from memory.codec import MAX_BATCH_PAGES, MAX_PAYLOAD_BYTES, BatchDecoder, BatchEncoder
from memory.errors import CodecError
from memory.history import PageHistory
from memory.layout import PAGE_BYTES
from memory.runs import Runs, expand, pages_in, runs_of_gfns
from migrate.compression import Compression
from migrate.cpudomain import read_domain_cpu
from migrate.cpufiles import MAX_FEATURES, MAX_MODELS, CpuFileInvalid, read_cpu_files
from migrate.cpunames import canonical_all
from migrate.errors import JournalFailed
from migrate.forecast import (
    QUANTITIES,
    Conditions,
    ContentSample,
    GuestLoad,
    MoveOutcome,
    Prediction,
    WriteWindow,
)
from migrate.lessons import scores
from migrate.ownership import Ownership, RecordInvalid, format_record, parse_record
from migrate.phases import Phase
from migrate.plan import OnTimeout
from migrate.predict import predict
from tests.fuzz.drawing import Draw
from tests.fuzz.loops import ScriptedStream, in_pieces, on_both_loops
from tests.fuzz.target import KIB, MIB, Target, law

__all__ = ["TARGETS"]

_FOLDER: Final = tempfile.TemporaryDirectory(prefix="vmferry-fuzz-")
_FILE: Final = Path(_FOLDER.name) / "m.log"
_TOTAL_PAGES: Final = 4096


class _Pages:
    """RAM of zeros, and of words where a number is odd."""

    def gather(self, runs: Runs, out: memoryview) -> int:
        words = np.zeros((pages_in(runs), PAGE_BYTES), dtype=np.uint8)
        words[:] = (expand(runs) % 2)[:, None]
        out[: words.nbytes] = words.data.cast("B")
        return words.nbytes


def _fuzz_batch(data: bytes) -> None:
    batch = BatchDecoder(_TOTAL_PAGES).decode(memoryview(data))
    zeros, pages = expand(batch.zero_runs), expand(batch.data_runs)
    both = np.concatenate([zeros, pages])
    law(len(np.unique(both)) == len(both), "a page is named twice")
    law(not len(both) or int(both.max()) < _TOTAL_PAGES, "a page beyond the guest's RAM")
    law(len(batch.pages) == len(pages) * PAGE_BYTES, "not as many bytes as pages")
    law(len(pages) <= MAX_BATCH_PAGES, "more pages than a batch has")


def _batch_seeds() -> tuple[bytes, ...]:
    out = memoryview(bytearray(MAX_PAYLOAD_BYTES))
    seeds = []
    for gfns, level in (([1], None), ([0, 1, 2, 3], 1), ([0, 2, 4], 1), ([_TOTAL_PAGES - 1], 1)):
        runs = runs_of_gfns(np.array(gfns, dtype=np.uint64))
        stats = BatchEncoder(None).encode_into(_Pages(), runs, out, level=level)
        seeds.append(bytes(out[: stats.payload_bytes]))
    history = PageHistory(4 * PAGE_BYTES)
    history.keep(runs)
    encoder = BatchEncoder(None, history=history)
    for as_delta in (False, True):
        encoder.load(_Pages(), runs, as_delta=as_delta)
        stats = encoder.write(out, level=None)
    return (*seeds, bytes(out[: stats.payload_bytes]))


def _fuzz_ownership(data: bytes) -> None:
    law(parse_record(format_record(parse_record(data))) == parse_record(data), "a record does not come back")


def _fuzz_image(data: bytes) -> None:
    law(format_of(data), "an image of no format")
    header = parse_qcow2(data)
    law(format_of(data) == "qcow2", "a header of another format")
    for name in (header.backing, header.backing_format, header.data_file):
        law(len(name.encode()) <= MAX_NAME_BYTES and "\0" not in name, "a name that is none")
    law(header.virtual_bytes < 1 << 63, "a size that does not travel")


def _image_seeds() -> tuple[bytes, ...]:
    """Headers as docs/interop/qcow2.txt has them: version 3 with a backing file and its format, and version 2."""
    extension = struct.pack(">II8sII8sII", 0xE2792ACA, 3, b"raw", 0x44415441, 4, b"data", 0, 0)
    fixed = struct.pack(">4sIQIIQ", b"QFI\xfb", 3, 104 + len(extension), 8, 16, 1 << 20).ljust(72, b"\0")
    newer = fixed + struct.pack(">Q", 4) + bytes(20) + struct.pack(">I", 104) + extension + b"base.raw"
    return newer, struct.pack(">4sIQIIQ", b"QFI\xfb", 2, 0, 0, 16, 1 << 20).ljust(80, b"\0")


def _fuzz_journal(data: bytes) -> None:
    _FILE.write_bytes(data)
    for entry in read_journal(_FILE):
        msgpack.packb([entry.step, entry.at_s, entry.facts])


def _journal_seeds() -> tuple[bytes, ...]:
    with tempfile.TemporaryDirectory() as folder:
        journal = JournalFile.create(Path(folder), "m")
        journal.append(JournalEntry(step="begun", at_s=1.0, facts={"guest": "g", "n": 1, "yes": True}))
        return (journal.path.read_bytes(),)


def _fuzz_config(data: bytes) -> None:
    _FILE.write_bytes(data[1:])
    if data[:1] == b"\0":
        load_client_settings(_FILE)
    else:
        load_settings(_FILE)


def _fuzz_quantity(data: bytes) -> None:
    draw = Draw(data)
    parse = draw.pick((parse_size, parse_rate, parse_duration))
    law(parse(draw.rest().decode("utf-8", "replace")) >= 0, "a quantity below nothing")


def _fuzz_domain_cpu(data: bytes) -> None:
    cpu = read_domain_cpu(data)
    for features in (cpu.added, cpu.removed):
        law(features == canonical_all(features), "features of two spellings, or out of order")
    law(len(cpu.added) + len(cpu.removed) <= MAX_FEATURES, "more features than a guest has")
    law(max(map(len, (cpu.domain, cpu.mode, cpu.check, cpu.vendor))) <= 256, "words without an end")


def _fuzz_cpu_file(data: bytes) -> None:
    """The file, beside one that others may come from."""
    base = b"<cpus><model name='Base'><feature name='sse2'/></model></cpus>"
    models = read_cpu_files((("base", base), ("fuzzed", data)))
    law(len({one.model for one in models}) == len(models) <= MAX_MODELS, "a model twice, or too many")
    for one in models:
        law(one.features == canonical_all(one.features), "features of two spellings, or out of order")
        law(len(one.features) <= MAX_FEATURES, "more features than a model has")
        law(0 <= max(one.family, one.number, one.stepping, one.level, one.xlevel) < 1 << 32, "beyond 32 bits")
        law(len(one.vendor) <= 12, "a maker's name that CPUID cannot give")


def _fuzz_qmp(data: bytes) -> None:
    """A QEMU that says these lines in answer to a command."""

    async def live() -> str:
        stream = ScriptedStream(in_pieces(data, 50))
        qmp = Qmp(cast(anyio.abc.UNIXSocketStream, stream), Path("/qmp"))
        return repr(await qmp._read_message())

    on_both_loops(live)


def _fuzz_predictions(data: bytes) -> None:
    _FILE.write_bytes(data)
    moves = PredictionFile(_FILE).read().moves()
    scores(moves)
    made = predict(_prediction().conditions, None, moves, prediction_id="p", made_at_s=0.0, draws=5)
    for quantity in QUANTITIES:
        found = made.figures.of(quantity)
        law(0 <= found.low <= found.median <= found.high < math.inf, f"{quantity} is no interval: {found}")


def _prediction() -> Prediction:
    conditions = Conditions(
        guest_id="g",
        guest_name="g",
        hypervisor="h",
        source="a",
        destination="b",
        ram_bytes=1 << 28,
        downtime_limit_s=0.3,
        timeout_s=0.0,
        on_timeout=OnTimeout.ABORT,
        bandwidth_bytes_per_s=1e8,
        goodput_bytes_per_s=None,
        is_offline=False,
        compression=Compression.AUTO,
        audit=True,
    )
    load = GuestLoad(
        populated_bytes=1 << 27,
        windows=(WriteWindow(window_s=0.1, pages=100), WriteWindow(window_s=1.0, pages=800)),
        sample=ContentSample(pages=512, zero_pages=12, duplicate_pages=0, zstd_bytes=1 << 20),
        took_s=1.0,
    )
    return predict(conditions, load, [], prediction_id="p", made_at_s=1.0, draws=5)


def _prediction_seeds() -> tuple[bytes, ...]:
    outcome = MoveOutcome(
        prediction_id="p",
        job="j",
        ended_at_s=1.0,
        phase=Phase.COMPLETE,
        total_s=1.5,
        downtime_s=0.02,
        wire_bytes=1 << 26,
        cpu_s=0.5,
        fixed_s=0.01,
        overhead_s=0.5,
        windows=(WriteWindow(window_s=1.0, pages=700),),
        first_s=1.0,
        first_raw_bytes=1 << 26,
        first_zstd_bytes=1 << 20,
        first_wire_bytes=1 << 26,
        sent_pages=32768,
        zero_pages=12,
        raw_pages=30000,
        zstd_pages=500,
        zstd_bytes=1 << 20,
    )
    with tempfile.TemporaryDirectory() as folder:
        file = PredictionFile(Path(folder) / "p.jsonl")
        file.append(_prediction())
        file.append(outcome)
        return (file.path.read_bytes(),)


TARGETS: Final = (
    Target(
        name="batch",
        law="pages within the guest, each once, as many bytes as they have; or CodecError",
        fuzz=_fuzz_batch,
        allowed=(CodecError,),
        seeds=_batch_seeds,
        most_input_bytes=16 * KIB,
        most_allocated_bytes=4 * MIB,
    ),
    Target(
        name="ownership-record",
        law="a record that is written again as the same, or RecordInvalid",
        fuzz=_fuzz_ownership,
        allowed=(RecordInvalid,),
        seeds=lambda: (format_record(Ownership(guest_id="g", generation=7, owner="a", migration_id="m")),),
    ),
    Target(
        name="journal",
        law="entries, or JournalCorrupt",
        fuzz=_fuzz_journal,
        allowed=(JournalCorrupt, JournalFailed),
        seeds=_journal_seeds,
    ),
    Target(
        name="predictions",
        law="moves of which the next prediction learns nothing absurd; what cannot be read is left out",
        fuzz=_fuzz_predictions,
        allowed=(),
        seeds=_prediction_seeds,
        most_input_bytes=16 * KIB,
    ),
    Target(
        name="config",
        law="settings, or ConfigInvalid",
        fuzz=_fuzz_config,
        allowed=(ConfigInvalid,),
        seeds=lambda: (
            b'\0[hosts.a]\naddress = "a:7700"\n',
            b'\1[agent]\nname = "a"\n[limits]\noutage = "5s"\n',
        ),
    ),
    Target(
        name="quantity",
        law="a number, or QuantityInvalid",
        fuzz=_fuzz_quantity,
        allowed=(QuantityInvalid,),
        seeds=lambda: (b"\x0010 MiB", b"\x011 Gbit/s", b"\x02500ms"),
    ),
    Target(
        name="cpu-map",
        law="models with features in one spelling, no entity expanded; or CpuFileInvalid",
        fuzz=_fuzz_cpu_file,
        allowed=(CpuFileInvalid,),
        seeds=lambda: (
            b"<cpus><model name='A'><signature family='6' model='60'/><vendor name='Intel'/>"
            b"<model name='Base'/><feature name='lahf_lm'/><feature name='hle' removed='yes'/></model></cpus>",
            b"<!DOCTYPE a [<!ENTITY b 'c'>]><cpus>&b;</cpus>",
            b"<cpus><vendor name='V' string='MakerOfChips'/></cpus>",
        ),
    ),
    Target(
        name="domain-cpu",
        law="a CPU with features in one spelling, no entity expanded; or CpuFileInvalid",
        fuzz=_fuzz_domain_cpu,
        allowed=(CpuFileInvalid,),
        seeds=lambda: (
            b"<domain><name>g</name><cpu mode='custom' check='full'><model>Nehalem</model><vendor>Intel</vendor>"
            b"<feature policy='require' name='lahf_lm'/><feature policy='disable' name='hle'/></cpu></domain>",
            b"<!DOCTYPE a [<!ENTITY b 'c'>]><domain><cpu>&b;</cpu></domain>",
            b"<domain><cpu mode='host-passthrough'/></domain>",
        ),
    ),
    Target(
        name="cpudef",
        law="models with features in one spelling, or CpuFileInvalid",
        fuzz=_fuzz_cpu_file,
        allowed=(CpuFileInvalid,),
        seeds=lambda: (
            b'# x\n[cpudef]\n  name = "A"\n  level = "2"\n  vendor = "GenuineIntel"\n  feature_edx = "sse2 fpu"\n'
            b'  feature_ecx = "sse4.1|sse4_1 sse3"\n  xlevel = "0x8000000A"\n',
        ),
    ),
    Target(
        name="qmp-line",
        law="an object, QmpFailed or QemuGone, on both loops",
        fuzz=_fuzz_qmp,
        allowed=(QmpFailed, QemuGone),
        seeds=lambda: (b'{"QMP": {"version": {}}}\n', b'{"event": "STOP", "timestamp": {"seconds": 1}}\n'),
    ),
    Target(
        name="disk-image",
        law="a header whose names have limits and no NUL, or FormatInvalid; any other image has a format",
        fuzz=_fuzz_image,
        allowed=(FormatInvalid,),
        seeds=_image_seeds,
    ),
)
