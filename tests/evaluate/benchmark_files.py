"""Benchmark files of their true shape, a few questions each, with small images."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL import Image
from pyarrow import parquet

COLOURS = ("red", "green", "blue", "yellow")


def picture(number: int = 0) -> bytes:
    """A PNG of one colour, another one for each number."""
    raw = io.BytesIO()
    Image.new("RGB", (24 + number, 24), (number * 37 % 256, 80, 160)).save(raw, "PNG")
    return raw.getvalue()


def put(path: Path, content: Any) -> Path:
    """Writes bytes, a text, or an object as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = content if isinstance(content, (bytes, str)) else json.dumps(content)
    path.write_bytes(raw.encode() if isinstance(raw, str) else raw)
    return path


def put_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    return put(path, "".join(json.dumps(row) + "\n" for row in rows))


def put_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


def put_tsv(path: Path, rows: list[dict[str, Any]]) -> Path:
    header = list(rows[0])
    return put(path, "".join("\t".join(map(str, line)) + "\n" for line in [header, *(row.values() for row in rows)]))


def vqa(folder: Path, *, is_okvqa: bool = False) -> dict[str, str]:
    questions, annotations = [], []
    for k in range(3):
        put(folder / f"images/COCO_val2014_{k:012d}.jpg", picture(k))
        questions.append({"question_id": 10 + k, "image_id": k, "question": f"What colour is thing {k}?"})
        answers = [{"answer": COLOURS[k], "answer_confidence": "yes", "answer_id": i + 1} for i in range(10)]
        annotations.append(
            {
                "question_id": 10 + k,
                "image_id": k,
                "question_type": "one" if is_okvqa else "what color is the",
                "answer_type": "other",
                "multiple_choice_answer": COLOURS[k],
                "answers": answers,
            }
        )
    head = {"info": {}, "license": {}, "data_type": "mscoco", "data_subtype": "val2014"}
    names = {"question_types": {"one": "Vehicles and Transportation"}} if is_okvqa else {}
    put(folder / "questions.json", {**head, "task_type": "Open-Ended", "questions": questions})
    put(folder / "annotations.json", {**head, **names, "annotations": annotations})
    return {key: str(folder / name) for key, name in (("questions", "questions.json"), ("images", "images"))} | {
        "annotations": str(folder / "annotations.json")
    }


def gqa(folder: Path) -> dict[str, str]:
    questions: dict[str, Any] = {}
    for k in range(3):
        put(folder / f"images/n{k}.jpg", picture(k))
        questions[f"0{k}"] = {
            "semantic": [
                {"operation": "select", "dependencies": [], "argument": "table (1)"},
                {"operation": "query", "dependencies": [0], "argument": "name"},
            ],
            "entailed": [f"0{k}", "09"],
            "equivalent": [f"0{k}"],
            "question": "Which colour is it?",
            "imageId": f"n{k}",
            "isBalanced": True,
            "groups": {"global": "color", "local": "10q-x"},
            "answer": COLOURS[k],
            "semanticStr": "",
            "annotations": {"answer": {}, "question": {}, "fullAnswer": {}},
            "types": {"detailed": "colorCommon", "semantic": "attr", "structural": "query"},
            "fullAnswer": "It is.",
        }
    questions["09"] = {**questions["00"], "isBalanced": False, "entailed": []}
    put(folder / "testdev_balanced_questions.json", questions)
    put(folder / "choices.json", {key: {"valid": list(COLOURS), "plausible": ["red"]} for key in questions})
    return {
        "questions": str(folder / "testdev_balanced_questions.json"),
        "choices": str(folder / "choices.json"),
        "images": str(folder / "images"),
    }


def mmbench_rows() -> list[dict[str, Any]]:
    """Two questions, of three and two options, with all their rotations."""
    rows = []
    for base, options, right in ((4, ["cat", "bus", "dog"], 1), (7, ["one", "two"], 0)):
        for turn in range(len(options)):
            turned = options[turn:] + options[:turn]
            cells = dict(zip("ABCD", [*turned, "", ""], strict=False))
            rows.append(
                {
                    "index": base + turn * 1_000_000,
                    "question": f"What is in picture {base}?",
                    "hint": "Look." if base == 4 else "nan",
                    **cells,
                    "answer": "ABC"[turned.index(options[right])],
                    "category": "ocr",
                    "image": base if turn else base64.b64encode(picture(base)).decode(),
                    "source": "made",
                    "l2-category": "finegrained_perception (instance-level)",
                    "comment": "",
                    "split": "dev",
                }
            )
    return rows


def mmbench(folder: Path) -> dict[str, str]:
    return {"questions": str(put_tsv(folder / "mmbench_dev.tsv", mmbench_rows()))}


def captions(folder: Path) -> dict[str, str]:
    images, annotations = [], []
    for k in range(3):
        put(folder / f"images/{k}.jpg", picture(k))
        images.append({"id": k, "file_name": f"{k}.jpg", "width": 24, "height": 24})
        texts = f"A {COLOURS[k]} square.", f"The picture is {COLOURS[k]}"
        annotations += [{"id": 2 * k + i, "image_id": k, "caption": text} for i, text in enumerate(texts)]
    put(folder / "captions_val2014.json", {"info": {}, "images": images, "annotations": annotations})
    return {"annotations": str(folder / "captions_val2014.json"), "images": str(folder / "images")}


def mme(folder: Path) -> dict[str, str]:
    text = "Is it red? Please answer yes or no.\tYes\nIs it blue? Please answer yes or no.\tNo\n"
    for place, sub in (("count", ""), ("artwork/images", "artwork/questions_answers_YN")):
        put(folder / place / "0001.png", picture(3))
        put(folder / (sub or place) / "0001.txt", text)
    put(folder / "eval_tool/readme.txt", "not a task")
    return {"questions": str(folder)}


def pope(folder: Path) -> dict[str, str]:
    for category in ("adversarial", "random"):
        rows = []
        for k in range(2):
            put(folder / f"val2014/COCO_val2014_{k:012d}.jpg", picture(k))
            label = "yes" if k else "no"
            image = f"COCO_val2014_{k:012d}.jpg"
            rows.append({"question_id": k + 1, "image": image, "text": "Is there a snowboard?", "label": label})
        put_lines(folder / f"coco/coco_pope_{category}.json", rows)
    return {"questions": str(folder / "coco"), "images": str(folder / "val2014")}


def scienceqa(folder: Path) -> dict[str, str]:
    problems = {}
    for k in range(3):
        problems[str(k)] = {
            "question": "Which is  farthest north?",
            "choices": ["Maine", "Texas"],
            "answer": k % 2,
            "hint": "",
            "image": "image.png" if k else None,
            "subject": "social science",
            "lecture": "",
            "solution": "",
            "split": "test",
        }
        if k:
            put(folder / f"images/test/{k}/image.png", picture(k))
    put(folder / "problems.json", problems)
    put(folder / "pid_splits.json", {"test": ["0", "1", "2"], "val": []})
    return {
        "questions": str(folder / "problems.json"),
        "splits": str(folder / "pid_splits.json"),
        "images": str(folder / "images/test"),
    }


def seedbench(folder: Path) -> dict[str, str]:
    questions = []
    for k, kind in enumerate(("image", "image", "video")):
        questions.append(
            {
                "answer": "AB"[k % 2],
                **{f"choice_{letter}": f"{letter} thing" for letter in "abcd"},
                "data_id": f"1454426_{k}",
                "data_type": kind,
                "question": "What is it?",
                "question_id": str(100 + k),
                "question_type_id": 1,
                "segment": [0, 1],
            }
        )
        put(folder / f"SEED-Bench-image/1454426_{k}", picture(k))
    put(folder / "SEED-Bench.json", {"questions": questions, "question_type": {"Scene Understanding": 1}})
    return {"questions": str(folder / "SEED-Bench.json"), "images": str(folder / "SEED-Bench-image")}


def mmmu_rows(subject: str = "Art") -> list[dict[str, Any]]:
    def image(k: int) -> dict[str, Any]:
        return {"bytes": picture(k), "path": f"{k}.png"}

    common = {"explanation": "", "topic_difficulty": "Easy", "subfield": "x", "img_type": "['Paintings']"}
    return [
        {
            "id": f"validation_{subject}_1",
            "question": "<image 1> Who painted it?",
            "options": "['Monet', \"Manet's\"]",
            "answer": "B",
            "question_type": "multiple-choice",
            "image_1": image(1),
            "image_2": None,
            **common,
        },
        {
            "id": f"validation_{subject}_2",
            "question": "How many are in <image 1> and <image 2>?",
            "options": "[]",
            "answer": "['4', 'four']",
            "question_type": "open",
            "image_1": image(2),
            "image_2": image(3),
            **common,
        },
    ]


def mmmu(folder: Path) -> dict[str, str]:
    for subject in ("Art", "Math"):
        put_parquet(folder / subject / "validation-00000-of-00001.parquet", mmmu_rows(subject))
    put_parquet(folder / "Art/test-00000-of-00001.parquet", [{**mmmu_rows()[0], "id": "test_Art_1", "answer": "?"}])
    return {"questions": str(folder)}


def mathvista(folder: Path) -> dict[str, str]:
    rows = [
        {
            "pid": str(k),
            "question": "Which one is larger?",
            "image": f"images/{k}.jpg",
            "decoded_image": {"bytes": picture(k), "path": f"{k}.jpg"},
            "choices": ["the left one", "the right one"] if k else None,
            "answer": "the right one" if k else "3",
            "question_type": "multi_choice" if k else "free_form",
            "answer_type": "text",
            "metadata": {"task": "geometry problem solving"},
            "query": "",
        }
        for k in range(3)
    ]
    return {"questions": str(put_parquet(folder / "testmini-00000-of-00001.parquet", rows))}


def custom(folder: Path) -> dict[str, str]:
    rows = [
        {"image": f"{k}.png", "question": "Which colour?", "answer": COLOURS[k], "type": "colour"} for k in range(3)
    ]
    for k in range(3):
        put(folder / f"{k}.png", picture(k))
    return {"questions": str(put_lines(folder / "questions.jsonl", rows))}


MAKERS = {
    "vqav2": vqa,
    "okvqa": lambda folder: vqa(folder, is_okvqa=True),
    "gqa": gqa,
    "mmbench": mmbench,
    "mmbench_cn": mmbench,
    "captions": captions,
    "mme": mme,
    "pope": pope,
    "scienceqa": scienceqa,
    "seedbench": seedbench,
    "mmmu": mmmu,
    "mathvista": mathvista,
    "custom": custom,
}
"""Name of a benchmark -> what writes its files into a folder and gives the keys of its section."""
