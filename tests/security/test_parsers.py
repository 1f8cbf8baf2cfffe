"""Whatever bytes stand in a file of somebody else: its reader gives a value or its documented error, nothing else.

Each reader is given whole files that were changed here and there, which reach deeper than bytes at random do.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mgm_exp.compare.html.trouble import _events
from mgm_exp.compare.predictions import read_predictions
from mgm_exp.compare.runs import load_run, load_runs
from mgm_exp.data import ImageFault, open_image
from mgm_exp.data.formats import read_rows
from mgm_exp.errors import ConfigError, DataError, ModelError, UserError
from mgm_exp.evaluate.benchmarks.annotations import read_annotations
from mgm_exp.evaluate.judge import _text_of
from mgm_exp.evaluate.readers import literal_list, read_json, read_json_lines, read_parquet, read_tsv
from mgm_exp.ledger import _entries
from mgm_exp.model.adapters.files import read_adapter_config, read_safetensors
from mgm_exp.model.tensors import read_pickled
from mgm_exp.store import parse_record, parse_yaml, verify
from mgm_exp.store.claims import read_claim
from mgm_exp.store.sealed import MARK
from mgm_exp.train.machines import read_hostfile
from tests.fault_table import met

from . import hostile_files as hostile

ROW = hostile.row(1, image=None)
CLAIM = {
    "nonce": "0a", "has_lock": True, "released_at": None,
    "holder": {"pid": 1, "host": "a", "boot_id": "b", "started": 1.0, "name": "c"},
}  # fmt: skip
TRIAL = {"number": 0, "params": {"adapter.rank": 8}, "overrides": ["seed=0"], "run_dir": "0", "seeds": []}
PREDICTION = {"question_id": "1", "image_id": "1", "question": "q", "answers": ["a"], "prediction": "a", "score": 1.0}
YAML = "a: &a [1, x]\nb: {c: *a, d: !!float 1}\ne: |\n  text\nf: 2020-01-01\n'g': !!timestamp 2020-01-01\n"


@dataclass(frozen=True)
class Reader:
    """Reads what was written to ``name`` in a folder; may raise ``errors``."""

    read: Callable[[Path], Any]
    whole: tuple[bytes, ...]
    errors: tuple[type[Exception], ...] = (ValueError,)
    name: str = "file"


def as_json(*values: Any) -> tuple[bytes, ...]:
    return tuple(json.dumps(value).encode() for value in values)


def image(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.effect_mandelbrot((16, 12), (-2, -1, 1, 1), 20).convert("P" if kind == "GIF" else "RGB").save(buffer, kind)
    return buffer.getvalue()


def torch_file() -> bytes:
    import torch

    buffer = io.BytesIO()
    torch.save({"weight": torch.ones(3)}, buffer)
    return buffer.getvalue()


def shard() -> bytes:
    path = io.BytesIO()
    import tarfile

    with tarfile.open(fileobj=path, mode="w") as archive:
        for name, content in (("1.json", json.dumps(ROW).encode()), ("1.png", hostile.good_png())):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path.getvalue()


def table() -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([ROW, ROW | {"id": "b"}]), buffer)
    return buffer.getvalue()


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("data.pkl", pickle.dumps({"a": 1}))
    return buffer.getvalue()


def lines(*values: Any) -> bytes:
    return b"".join(line + b"\n" for line in as_json(*values))


def of_text(parse: Callable[[str], Any]) -> Callable[[Path], Any]:
    return lambda path: parse(path.read_bytes().decode("utf-8"))


def drained(rows: Iterator[Any]) -> int:
    return sum(1 for _ in rows)


def mark(path: Path) -> Any:
    (path.parent / "state").write_bytes(b"state")
    return verify(path.parent)


def run(path: Path) -> Any:
    found = load_run(path.parent, params={})
    return found.benchmarks, found.status, _events(found)


READERS: dict[str, Callable[[], Reader]] = {
    "JSON of a run or model": lambda: Reader(lambda path: parse_record(path.read_bytes()), as_json({"a": [1.5, None]})),
    "YAML": lambda: Reader(of_text(parse_yaml), (YAML.encode(),)),
    "rows in JSON": lambda: Reader(lambda p: drained(read_rows(p)), as_json([ROW, ROW]), (DataError,), "rows.json"),
    "rows in lines": lambda: Reader(lambda p: drained(read_rows(p)), (lines(ROW, ROW),), (DataError,), "rows.jsonl"),
    "rows in a shard": lambda: Reader(lambda p: drained(read_rows(p)), (shard(),), (DataError,), "rows.tar"),
    "rows in Parquet": lambda: Reader(lambda p: drained(read_rows(p)), (table(),), (DataError,), "rows.parquet"),
    "images": lambda: Reader(
        lambda path: open_image(path.parent, path.name, 1),
        tuple(image(kind) for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP")),
        (ImageFault,),
    ),
    "safetensors": lambda: Reader(read_safetensors, tuple(hostile.SAFETENSORS.values()), (ModelError,)),
    "pickled tensors": lambda: Reader(read_pickled, (torch_file(), zipped(), pickle.dumps({"a": 1})), (ModelError,)),
    "an adapter's settings": lambda: Reader(
        lambda path: read_adapter_config(path.parent), as_json({"peft_type": "LORA", "r": 8, "auto_mapping": None}),
        (ModelError,), "adapter_config.json",
    ),
    "a benchmark's JSON": lambda: Reader(read_json, as_json({"questions": [{"question_id": 1}]}), (DataError,)),
    "a benchmark's lines": lambda: Reader(lambda p: drained(read_json_lines(p)), (lines({"a": 1}, {}),), (DataError,)),
    "a benchmark's table": lambda: Reader(
        lambda path: drained(read_tsv(path)[1]), (b'index\ta\n1\t"x ""y"""\n2\tz\n',), (DataError,)
    ),
    "a benchmark's Parquet": lambda: Reader(lambda p: drained(read_parquet(p, ["id"])), (table(),), (DataError,)),
    "captions to compare with": lambda: Reader(
        lambda path: read_annotations(path),
        as_json({"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 1, "id": 1, "caption": "x"}]}),
        (DataError,), "captions.json",
    ),
    "a list in a cell": lambda: Reader(of_text(literal_list), (b"['a', \"b\", 'c' 'd', 1]", b"[[1, {2: (3,)}], -1j]")),
    "a judge's reply": lambda: Reader(
        lambda path: _text_of(path.read_bytes()), as_json({"choices": [{"message": {"content": "A"}}]})
    ),
    "a seal": lambda: Reader(mark, as_json({"schema_version": 1, "files": {"state": {"size": 5}}}), (), MARK),
    "a claim": lambda: Reader(read_claim, as_json(CLAIM), (), "claim-000001.json"),
    "the books of a sweep": lambda: Reader(_entries, as_json({"trials": [TRIAL], "pending": [TRIAL]}), (UserError,)),
    "a sweep to compare": lambda: Reader(
        lambda path: load_runs([path.parent]), as_json({"trials": [TRIAL, TRIAL | {"number": 1}]}), (UserError,),
        "sweep.json",
    ),
    "a run's result": lambda: Reader(
        run, as_json({"status": "failed", "error": {"cause": "x"}, "metrics": {"demo/accuracy": 0.5}}), (UserError,),
        "result.json",
    ),
    "a run's settings": lambda: Reader(
        run, (b"name: a\ntrain: {lr: 1.0}\n" + YAML.encode(),), (UserError,), "config.yaml"
    ),
    "a run's events": lambda: Reader(
        run, (lines({"stage": "instruct", "step": 1, "event": "spike", "sample_ids": ["a"]}),), (UserError,),
        "metrics.jsonl",
    ),
    "a run's predictions": lambda: Reader(
        read_predictions, (lines(PREDICTION, PREDICTION | {"question_id": "2"}),), (UserError,)
    ),
    "a hostfile": lambda: Reader(read_hostfile, (b"a slots=2\nb:3 # c\n\nd\n",), (ConfigError,)),
}  # fmt: skip

# What readers stumble over, more often than over bytes at random.
BROKEN = (
    [b"", b"[", b"]", b"{", b"}", b'"', b"'", b"\n", b"\t", b":", b",", b"null", b"NaN", b"1e999", b"-", b"0", b"1.5",
     b"true", b'"x"', b"[]", b"{}", b"\x00", b"\xff", b"\\ud800", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"../", b"!!int ",
     b"!!timestamp ", b"!!bool ", b"&a ", b"*a", b"<<: ", b"slots=", b"9" * 5000, b"[" * 70, b"[" * 9999, b'{"a":' * 70]
)  # fmt: skip
PIECES = st.binary(max_size=6) | st.sampled_from(BROKEN)
EXAMPLES = 40
EDITS = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 12), PIECES), max_size=4)


@pytest.mark.parametrize("what", READERS)
def test_a_changed_file_is_read_or_is_its_readers_error(what: str, tmp_path: Path) -> None:
    reader = READERS[what]()

    @given(st.sampled_from(reader.whole), EDITS, st.booleans())
    @settings(max_examples=EXAMPLES, deadline=None)
    def check(content: bytes, edits: list[tuple[float, int, bytes]], is_cut: bool) -> None:
        for place, length, piece in edits:
            at = int(place * len(content))
            content = content[:at] + piece + (b"" if is_cut else content[at + length :])
        (tmp_path / reader.name).write_bytes(content)
        with contextlib.suppress(reader.errors):
            reader.read(tmp_path / reader.name)

    check()
    met("fuzzed", EXAMPLES)


FOUND: dict[str, tuple[str, Callable[[], bytes]]] = {
    "an instruction that finds the stack empty": ("pickled tensors", lambda: b"\x86."),
    "a column whose name is no text": ("a benchmark's Parquet", lambda: table().replace(b"\x02id", b"\x02\x97d")),
    "a column of rows whose name is no text": ("rows in Parquet", lambda: table().replace(b"\x02id", b"\x02\x97d")),
}


@pytest.mark.parametrize("found", FOUND)
def test_what_fuzzing_has_found_stays_mended(found: str, tmp_path: Path) -> None:
    what, make = FOUND[found]
    reader = READERS[what]()
    (tmp_path / reader.name).write_bytes(make())
    with pytest.raises(reader.errors):
        reader.read(tmp_path / reader.name)


# Some minutes of one core; more of them find more.
RUNS = 30_000


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_files_that_reach_further_and_further_into_the_readers_are_read_or_refused(tmp_path: Path) -> None:
    """The environment's FUZZ_RUNS asks for another number of files."""
    pytest.importorskip("atheris", reason="atheris is not installed (pip install atheris; CPython up to 3.13)")
    runs = int(os.environ.get("FUZZ_RUNS", RUNS))
    done = subprocess.run(
        [sys.executable, "-m", "tests.security.fuzz", str(tmp_path / "corpus"), f"-runs={runs}", "-seed=1",
         "-max_len=8192", "-timeout=60", "-rss_limit_mb=4096", f"-artifact_prefix={tmp_path}/"],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=3500,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    met("fuzzed", runs)
