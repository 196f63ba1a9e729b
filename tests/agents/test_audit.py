from __future__ import annotations

import json
from pathlib import Path

from agents.audit import REFUSALS_PER_MINUTE, AuditFile, AuditLine, Outcome, RefusalFold


def line(**changed: object) -> AuditLine:
    values: dict[str, object] = {
        "at_s": 0.0,
        "outcome": Outcome.DENIED,
        "peer": "operator/eva",
        "address": "127.0.0.1",
        "action": "move",
    }
    return AuditLine(**(values | changed))  # type: ignore[arg-type]


def test_control_characters_are_escaped_and_long_text_is_cut() -> None:
    raw = line(guest="a\n\x1b[31m\x7f\u2028" + "x" * 5000).to_bytes()
    assert raw.count(b"\n") == 1
    assert all(32 <= byte < 127 for byte in raw[:-1])
    assert len(json.loads(raw)["guest"]) == 600


def test_the_file_is_only_its_owners_and_goes_on_after_half_a_line(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    path.write_bytes(b'{"half')
    path.chmod(0o644)
    file = AuditFile(path)
    file.append(b"whole\n")
    file.close()
    assert path.read_bytes() == b'{"half\nwhole\n'
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_full_file_is_moved_away_and_the_oldest_goes(tmp_path: Path) -> None:
    file = AuditFile(tmp_path / "audit", rotate_bytes=6, kept_files=2)
    for number in range(4):
        file.append(b"line%d\n" % number)
    file.close()
    found = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert found == {"audit": b"line3\n", "audit.1": b"line2\n", "audit.2": b"line1\n"}


def test_a_file_that_was_moved_away_is_opened_anew(tmp_path: Path) -> None:
    file = AuditFile(tmp_path / "audit")
    file.append(b"one\n")
    (tmp_path / "audit").rename(tmp_path / "moved")
    file.append(b"two\n")
    file.close()
    assert (tmp_path / "audit").read_bytes() == b"two\n"


def test_refusals_of_one_peer_are_counted_when_there_are_too_many() -> None:
    fold = RefusalFold()
    assert sum(fold.admits("eva", 0.0) for _ in range(REFUSALS_PER_MINUTE + 5)) == REFUSALS_PER_MINUTE
    assert fold.admits("other", 0.0)
    assert fold.left_out(59.9) == []
    assert fold.left_out(60.0) == [("eva", 5)]
    assert fold.admits("eva", 60.0)
