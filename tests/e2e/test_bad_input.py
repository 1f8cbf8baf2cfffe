"""A user's mistake is answered with one paragraph and exit code 2: what was given, what is allowed, what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from mgm_exp.command import main

ROW = {
    "id": "1",
    "image": "1.png",
    "conversations": [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a sign"}],
}


def answer(capsys: pytest.CaptureFixture[str], tmp_path: Path, *overrides: str) -> tuple[int, str]:
    code = main(["debug=fast", "device=cpu", f"paths.root={tmp_path / 'outputs'}", *overrides])
    captured = capsys.readouterr()
    return code, captured.err


@pytest.mark.parametrize(
    ("overrides", "phrases"),
    [
        (["adapter=lora_r9"], ["lora_r9", "lora_r8"]),
        (["train.lerning_rate=1"], ["lerning_rate"]),
        (["train.lr=fast"], ["train.lr", "fast"]),
        (["train.lr=-1"], ["train.lr=-1", "above 0"]),
        (["adapter=full", "adapter.rank=4"], ["adapter=full", "lora_r8"]),
        (["zero=4"], ["zero", "4", "2"]),
        (["devices=3"], ["global_batch_size", "devices=3"]),
        (["device=cuda"], ["device=cuda", "no GPU"]),
        (["model.attn_implementation=flash_attention_2"], ["flash_attention_2", "sdpa"]),
        (["model=mgm_2b", "eval=demo"], ["model.path"]),
        (["model.path=/no/such/folder"], ["/no/such/folder", "not a folder"]),
        (["data.path=/no/such/file.json"], ["/no/such/file.json", "not there"]),
        (["eval=textvqa"], ["eval.textvqa.annotations"]),
        (["name=../../elsewhere"], ["name", "folder name"]),
        (["zero=none", "zero.offload_optimizer=cpu"], ["zero=2"]),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_a_mistake_on_the_command_line_is_one_paragraph(
    overrides: list[str], phrases: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, said = answer(capsys, tmp_path, *overrides)
    assert code == 2, said
    assert "Traceback" not in said
    for phrase in phrases:
        assert phrase in said
    for log in tmp_path.rglob("log.txt"):  # of a run whose folder was made already
        assert phrases[0] in log.read_text(encoding="utf-8")


def write_rows(folder: Path, rows: list[dict]) -> Path:
    file = folder / "rows.json"
    file.write_text(json.dumps(rows), encoding="utf-8")
    return file


def good_rows(folder: Path, n: int) -> list[dict]:
    rows = []
    for i in range(n):
        Image.new("RGB", (40, 30), (i * 10 % 255, 90, 120)).save(folder / f"good{i}.png")
        rows.append({**ROW, "id": f"good{i}", "image": f"good{i}.png"})
    return rows


def test_bad_rows_and_images_are_counted_and_named_and_never_replaced(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    rows = good_rows(folder, 16)
    (folder / "zero.png").write_bytes(b"")
    (folder / "text.png").write_bytes(b"this is no image")
    Image.new("RGB", (20, 20)).save(
        folder / "moves.gif", save_all=True, append_images=[Image.new("RGB", (20, 20), "red")]
    )
    Image.new("CMYK", (40, 30)).save(folder / "cmyk.jpg")
    two = [{"from": "human", "value": "<image>\n<image>\nwhich?"}, {"from": "gpt", "value": "one"}]
    rows += [
        {**ROW, "id": "zero", "image": "zero.png"},
        {**ROW, "id": "text", "image": "text.png"},
        {**ROW, "id": "moves", "image": "moves.gif"},
        {**ROW, "id": "cmyk", "image": "cmyk.jpg"},
        {**ROW, "id": "gone", "image": "gone.png"},
        {**ROW, "id": "two", "image": "good0.png", "conversations": two},
        {"id": "silent", "image": "good1.png"},
        {
            **ROW,
            "id": "cut",
            "image": "good2.png",
            "conversations": [
                {"from": "human", "value": "<image>\n" + "what is this? " * 400},
                {"from": "gpt", "value": "a sign"},
            ],
        },
    ]
    given = [f"data.path={write_rows(folder, rows)}", "train.max_length=256", "train.align.max_length=256"]
    code, said = answer(capsys, tmp_path, *given, "data.max_bad_share=0.9", "eval.demo.baselines=false")
    assert code == 0, said
    (entry,) = (path for path in (tmp_path / "outputs" / "store" / "curate").iterdir() if not path.suffix)
    rejected = [json.loads(line) for line in (entry / "rejected.jsonl").read_text().splitlines()]
    assert {row["id"] for row in rejected} == {"zero", "text", "moves", "gone", "two", "silent", "cut"}
    assert all(row["kind"] and row["detail"] for row in rejected)
    kept = [json.loads(line)["id"] for line in (entry / "align.jsonl").read_text().splitlines()]
    assert kept == [f"good{i}" for i in range(16)] + ["cmyk"]

    code, said = answer(capsys, tmp_path, *given, "data.bad_rows=fail")
    assert code == 2
    assert "zero" in said

    code, said = answer(capsys, tmp_path, *given, "data.max_bad_share=0.05")
    assert code == 2
    assert "max_bad_share" in said


def test_a_checkpoint_of_another_architecture_is_refused_by_name(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = tmp_path / "llama"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 64}))
    code, said = answer(capsys, tmp_path, f"model.path={folder}")
    assert code == 2
    assert "llama" in said


@pytest.mark.parametrize("form", ["llava", "data_juicer"])
def test_a_users_own_small_dataset_trains_by_path(
    form: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    rows = good_rows(folder, 16)
    if form == "data_juicer":
        rows = [
            {"id": row["id"], "text": "<__dj__image>\na sign <|__dj__eoc|>", "images": [row["image"]]} for row in rows
        ]
        file = folder / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        file = write_rows(folder, rows)
    code, said = answer(capsys, tmp_path, f"data.path={file}", "eval.demo.baselines=false")
    assert code == 0, said
    (run,) = (tmp_path / "outputs" / "runs").glob("*/*/")
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["data"]["n_train"] == 16
