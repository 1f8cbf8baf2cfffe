"""One study, written by two machines through mounts whose file locks do not know of each other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.shared_mounts import two_hosts, why_not

RECORDS = 60
APPEND = """
import sys
from pathlib import Path
from mgm_exp.search.journal import StudyJournal
folder, name, records = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
journal = StudyJournal(folder / "study.journal")
print("ready", flush=True)
sys.stdin.readline()
for number in range(records):
    journal.append_logs([{"host": name, "number": number, "text": "x" * (number % 7 * 100)}])
"""


@pytest.mark.skipif(bool(why_not()), reason=why_not())
def test_no_record_is_lost_where_locks_are_kept_to_each_machine(tmp_path: Path) -> None:
    with two_hosts(tmp_path, late_s=1, attributes_s=0) as hosts:
        writers = [host.start(APPEND, host.name, RECORDS) for host in hosts]
        for writer in writers:
            assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
        for writer in writers:
            assert writer.stdin is not None
            writer.stdin.write("\n")
            writer.stdin.flush()
        for writer in writers:
            _, errors = writer.communicate(timeout=60)
            assert writer.returncode == 0, errors
    rows = [json.loads(line) for line in (tmp_path / "server" / "study.journal").read_text().splitlines()]
    found = sorted((row["host"], row["number"]) for row in rows)
    assert found == sorted((host.name, number) for host in hosts for number in range(RECORDS))
