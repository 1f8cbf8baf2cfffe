"""Logs of any size and content are read in bounded time and memory."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from mgm_exp.doctor import case_of_log, diagnose, entries
from mgm_exp.doctor.patterns import Pattern
from mgm_exp.doctor.reading import LONGEST_LINE, lines_of, plain_line, read_log
from mgm_exp.errors import UserError


def test_of_a_long_log_head_and_tail_are_read_and_lines_keep_their_numbers(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    lines = [f"line {number} of a log" for number in range(1, 60_001)]
    lines[99] = "RuntimeError: received 0 items of ancdata"
    lines[-3] = "OSError: [Errno 122] Disk quota exceeded"
    log.write_text("\n".join(lines) + "\n")
    found = read_log(log, "log.txt", 10_000, 20_000)
    assert len(found) < 3000
    for line in found:
        assert line.text == lines[line.number - 1]
    assert {line.number for line in found} >= {1, 100, 60_000}
    assert diagnose(case_of_log(log)).findings[0].evidence[0].place == "log.txt:59998"


@pytest.mark.parametrize("end", [b"\n", b""], ids=["whole", "torn"])
def test_a_file_of_one_line_of_ten_megabytes_is_looked_through_quickly(tmp_path: Path, end: bytes) -> None:
    log = tmp_path / "log.txt"
    # What nearly fits many patterns again and again is what makes bad patterns slow.
    unit = b"nccl timeout error: Error building size mismatch for x lacks tensors of The image 'a' is in use by "
    log.write_bytes(b"RuntimeError: " + unit * (10_000_000 // len(unit)) + b" Disk quota exceeded" + end)
    started = time.process_time()
    found = diagnose(case_of_log(log))
    assert found.findings[0].entry.id == "quota-exceeded", "beginning and end of a long line are kept"
    assert time.process_time() - started < 5


def test_every_pattern_is_quick_on_lines_made_to_be_slow() -> None:
    hostile = ["a" * LONGEST_LINE, "'" * LONGEST_LINE, "x=1 " * 500, "(" * 999 + ")" * 999, "lacks " * 333, "1." * 999]
    started = time.process_time()
    for found in entries():
        for pattern in (*found.text, *found.unless):
            for line in hostile:
                pattern.fits(line)
    assert time.process_time() - started < 5


def test_bytes_that_are_no_text_escapes_and_bars_do_not_hide_an_error(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    bar = b"\rtrain  1/9\rtrain  2/9\r\x1b[31mtorch.OutOfMemoryError\x1b[0m: CUDA out of memory\xff\xfe\x00\n"
    log.write_bytes(b"\x80\x81\n" + bar + b"\x1b]0;title\x07 end\n")
    (evidence, *_) = diagnose(case_of_log(log)).findings[0].evidence
    assert evidence.quote.startswith("torch.OutOfMemoryError: CUDA out of memory")
    assert "\x1b" not in evidence.quote and "\x00" not in evidence.quote
    assert plain_line("50%\r100%\r") == "100%"


def test_what_the_doctor_printed_before_is_not_read_as_a_symptom() -> None:
    assert lines_of("doctor: The disk is full: No space left on device\n", "log.txt") == []


def test_a_secret_in_a_line_is_not_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "canarywandb0123456789abcdef0123456789abcdef")
    log = tmp_path / "log.txt"
    log.write_text("wandb: ERROR no permission for key canarywandb0123456789abcdef0123456789abcdef (401)\n")
    found = diagnose(case_of_log(log))
    assert found.findings and "canarywandb" not in str(found.as_json())


def test_what_is_no_plain_file_is_refused_in_words(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="cannot be read"):
        case_of_log(tmp_path / "pipe")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("CUDA out of memory", ("cuda out of memory",)),
        (r"exitcode\s*:\s*-9\b", ("exitcode",)),
        ("abc|de+fgh|[xyz]hello", ("abc", "fgh", "hello")),
        (r"a\.b{2,3}cdef", ("cdef",)),
        (r"\d+ of", (" of",)),
        (r"(?:one|two) three{2,10}s x?four", (" thre",)),
        ("(?:ab|cd)", ()),
    ],
)
def test_words_of_a_pattern_are_in_every_match(text: str, words: tuple[str, ...]) -> None:
    assert Pattern(text).words == words


def test_a_pattern_fits_only_lines_that_hold_one_of_its_words() -> None:
    """Over all excerpts: what a pattern fits, its words let through."""
    from tests.doctor.accuracy import EXCERPTS, HELD_OUT, texts

    lines = [line.text for folder in (EXCERPTS, HELD_OUT) for *_, text in texts(folder) for line in lines_of(text, "")]
    for found in entries():
        for pattern in found.text:
            assert all(pattern.may_be_in(line.lower()) for line in lines if pattern.fits(line)), pattern
