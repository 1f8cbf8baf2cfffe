"""A folder of hostile files does no harm: nothing runs, memory stays bounded, each has an error of its own."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mgm_exp.cli import main
from mgm_exp.data import ImageFault, open_image
from mgm_exp.errors import DataError, ModelError
from mgm_exp.evaluate.pictures import Pictures
from mgm_exp.evaluate.readers import literal_list, read_json, read_json_lines
from mgm_exp.store import parse_record, parse_yaml, read_record, read_text, read_yaml
from tests.fault_table import met

from . import hostile_files as hostile

REPOSITORY = Path(__file__).resolve().parents[2]
MOST_MIB = 400
# Of /proc and not of getrusage, which begins at what the process had that it was forked from.
PEAK = r"import re, sys; from mgm_exp.cli import main; code = main(sys.argv[1:]); " \
    r"print(int(re.search(r'VmHWM:\s+(\d+)', open('/proc/self/status').read())[1]) >> 10); sys.exit(code)"  # fmt: skip


@pytest.fixture
def sentinel(tmp_path: Path) -> Path:
    return tmp_path / "sentinel"


def test_hostile_rows_and_images_cost_themselves_only(tmp_path: Path, sentinel: Path) -> None:
    """In a process of its own, whose memory is measured: one bomb decoded would need 432 MB."""
    hostile.images(tmp_path / "images", sentinel)
    hostile.write_rows(tmp_path / "rows.jsonl")
    done = subprocess.run(
        [sys.executable, "-c", PEAK, "validate", str(tmp_path / "rows.jsonl"), "--images", str(tmp_path / "images"),
         "--json", str(tmp_path / "found.json")],
        capture_output=True, text=True, timeout=120, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) < MOST_MIB
    found = json.loads((tmp_path / "found.json").read_text())
    expected = {2 * n + 2: kind for n, (_, kind) in enumerate(hostile.LINES.values()) if kind}
    assert {fault["line"]: fault["kind"] for fault in found["broken"]} == expected
    assert all(fault["detail"] and len(fault["detail"]) < 500 for fault in found["broken"])
    assert found["rows"] == 2 * len(hostile.LINES) + 1 and found["ok"] == found["rows"] - len(expected)
    assert not sentinel.exists()
    met("hostile", len(hostile.LINES))


def test_a_shard_is_read_where_it_lies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = tmp_path / "deep" / "er" / "shards"
    shards.mkdir(parents=True)
    hostile.tar_shard(shards / "shard-000000.tar")
    before = sorted(tmp_path.rglob("*"))
    assert main(["validate", str(shards / "shard-000000.tar"), "--json", str(tmp_path / "found.json")]) == 2
    found = json.loads((tmp_path / "found.json").read_text())
    (tmp_path / "found.json").unlink()
    assert found["ok"] >= 1 and {fault["kind"] for fault in found["broken"]} >= {"missing"}
    assert sorted(tmp_path.rglob("*")) == before and not Path("/tmp/escaped-absolute.png").exists()
    capsys.readouterr()
    met("hostile", len(found["broken"]))


@pytest.mark.parametrize("name", ["bomb.png", "pickle.png", "pipe.png"])
def test_the_image_of_a_question_is_bounded_alike(
    name: str, tmp_path: Path, sentinel: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hostile.images(tmp_path / "images", sentinel)
    code = main(["ask", str(tmp_path), str(tmp_path / "images" / name), "what is it?"])
    assert code == 2 and f"{name} cannot be used" in capsys.readouterr().err and not sentinel.exists()
    met("hostile", 1)


def test_an_image_in_a_table_is_bounded_alike(tmp_path: Path, sentinel: Path) -> None:
    kept = Pictures(tmp_path)
    name = kept.keep_base64(base64.b64encode(hostile.png(12_000, 12_000)).decode())
    with pytest.raises(ImageFault, match="too_large"):
        open_image(tmp_path, name, 50)
    for content in (hostile.zip_bomb(), hostile.pickled(sentinel), b""):
        with pytest.raises(ValueError, match="no image of a known format"):
            kept.keep_base64(base64.b64encode(content).decode())
    assert [path.name for path in tmp_path.iterdir()] == [name]
    met("hostile", 4)


# -- weights, checkpoints -------------------------------------------------------------------------------------------


def test_pickles_are_refused_wherever_weights_may_lie(tmp_path: Path, sentinel: Path) -> None:
    from mgm_exp.model.adapters import load_adapter, load_connector
    from mgm_exp.model.tensors import read_pickled, tensor_map

    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8}))
    for content in (hostile.pickled(sentinel), hostile.torch_file(sentinel)):
        for name in ("adapter_model.bin", "pytorch_model.bin", "mm_projector.bin"):
            (tmp_path / name).write_bytes(content)
        for opened in (
            lambda: read_pickled(tmp_path / "pytorch_model.bin"),
            lambda: tensor_map(tmp_path),
            lambda: load_adapter(None, tmp_path),  # type: ignore[arg-type]
            lambda: load_connector(None, tmp_path / "mm_projector.bin"),  # type: ignore[arg-type]
        ):
            with pytest.raises(ModelError, match=r"other than tensors|damaged|no file of tensors"):
                opened()
    assert not sentinel.exists()
    met("hostile", 8)


@pytest.mark.parametrize("what", sorted(hostile.SAFETENSORS))
def test_safetensors_that_lie_about_themselves_are_refused(what: str, tmp_path: Path) -> None:
    from mgm_exp.model.adapters import read_safetensors

    (tmp_path / "a.safetensors").write_bytes(hostile.SAFETENSORS[what])
    with pytest.raises(ModelError, match="damaged or not a safetensors file"):
        read_safetensors(tmp_path / "a.safetensors")
    met("hostile", 1)


@pytest.mark.parametrize(
    "fields",
    [
        {"megatron_config": {"x": 1}, "megatron_core": "antigravity"},
        {"auto_mapping": {"base_model_class": "X", "parent_library": "antigravity"}},
        {"init_lora_weights": "pissa"},
        {"eva_config": {"rho": 2}},
        {"modules_to_save": ["lm_head"]},
    ],
    ids=lambda fields: str(next(iter(fields))),
)
def test_an_adapter_cannot_ask_for_another_method(fields: dict[str, object], tmp_path: Path) -> None:
    """PEFT would import the module that a field names."""
    from mgm_exp.model.adapters import load_adapter

    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8, **fields}))
    (tmp_path / "adapter_model.safetensors").write_bytes(hostile.safetensors({}))
    with pytest.raises(ModelError, match=str(next(iter(fields)))):
        load_adapter(None, tmp_path)  # type: ignore[arg-type]
    assert "antigravity" not in sys.modules
    met("hostile", 1)


def test_the_state_of_the_generators_is_json_and_nothing_else(tmp_path: Path, sentinel: Path) -> None:
    (tmp_path / "rng-0.json").write_bytes(hostile.pickled(sentinel))
    with pytest.raises(ValueError):
        read_record(tmp_path / "rng-0.json")
    assert not sentinel.exists()


# -- records of others ----------------------------------------------------------------------------------------------

BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 20)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[" * 100_000 + "]" * 100_000, "nested"),
        ("[" * 80 + "]" * 80, "nested deeper than 64"),
        ('{"a": ' * 80 + "1" + "}" * 80, "nested deeper than 64"),
        ("9" * 5000, "digit"),
        ("", "Expecting value"),
    ],
)
def test_a_record_in_json_is_bounded(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_record(text)
    met("hostile", 1)
    assert parse_record('{"a": [' + "[1], " * 500 + "[1]]}")["a"][500] == [1], "many brackets are not deep ones"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[" * 100_000 + "]" * 100_000, "nested deeper than 64"),
        (BOMB, "references to its own parts"),
        ("!!python/object/apply:os.system [id]", "could not determine a constructor"),
        ("a: !!python/name:os.system", "could not determine a constructor"),
        ("a: [", "YAML"),
        ("a: &a0 [x]\n" + "".join(f"b{n}: &a{n + 1} [*a{n}, *a{n}]\n" for n in range(40)), "to 100,000 values"),
        ("a: &a0 [x]\n" + "".join(f"b{n}: &a{n + 1} [*a{n}]\n" for n in range(80)), "nested deeper than 64"),
        ("&a [*a]", "refers to itself"),
        ("!!timestamp x", "does not fit"),
        ("!!int ''", "does not fit"),
        ("!!bool x", "does not fit"),
    ],
)
def test_a_record_in_yaml_is_bounded(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_yaml(text)
    met("hostile", 1)


def test_a_pipe_or_too_many_bytes_are_no_record(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(b"x" * 11)
    (tmp_path / "binary").write_bytes(b"\xff")
    for read in (read_text, read_record, read_yaml):
        with pytest.raises(ValueError, match="pipe or a device"):
            read(tmp_path / "pipe")
        with pytest.raises(OSError):
            read(tmp_path)
    with pytest.raises(ValueError, match="more than the 10 bytes"):
        read_text(tmp_path / "large", 10)
    with pytest.raises(ValueError):
        read_text(tmp_path / "binary")


def test_files_of_benchmarks_are_read_never_run(tmp_path: Path, sentinel: Path) -> None:
    with pytest.raises(ValueError):
        literal_list(f"__import__('os').system('touch {sentinel}')")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match="cannot be read as JSON"):
        read_json(tmp_path / "deep.json")
    (tmp_path / "lines.jsonl").write_bytes(b'{"a": "' + b"x" * (17 << 20) + b'"}\n')
    with pytest.raises(DataError, match="line 1 is longer"):
        list(read_json_lines(tmp_path / "lines.jsonl"))
    assert not sentinel.exists()
