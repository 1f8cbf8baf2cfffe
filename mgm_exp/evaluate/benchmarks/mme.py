"""MME: fourteen tasks of yes-or-no questions, two about each image, from the release folder or from parquet files."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mgm_exp.errors import DataError
from mgm_exp.evaluate.benchmarks.base import Benchmark, Question, Settings, Source, mean, refuse
from mgm_exp.evaluate.benchmarks.textvqa import INSTRUCTION
from mgm_exp.evaluate.classification import NEITHER
from mgm_exp.evaluate.metrics import class_scores, confusion_matrix, macro_f1, mme_yes_no
from mgm_exp.evaluate.pictures import Pictures
from mgm_exp.evaluate.readers import image_bytes, parquet_files, read_parquet
from mgm_exp.store import read_text

PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
_IN_FILE = " Please answer yes or no."
MAX_PAIR_BYTES = 1 << 20
_IMAGES = (".jpg", ".png", ".jpeg")


class Mme(Benchmark):
    """MME.

    Args:
        questions: Folder ``MME_Benchmark_release_version`` (a folder for each task), or parquet files.
        cache: Folder for the images of parquet files.
        settings: Batch size and limits.
    """

    name, split = "mme", "test"
    metric_version = "prefix-1"
    sources = (Source("questions", "file or folder", "the folder MME_Benchmark_release_version, or parquet files"),)

    def __init__(self, questions: Path, cache: Path, settings: Settings) -> None:
        self.folder = Path(questions)
        self._tasks = [task for task in (*PERCEPTION, *COGNITION) if (self.folder / task).is_dir()]
        self._is_parquet = not self._tasks
        super().__init__(cache if self._is_parquet else self.folder, settings)

    @classmethod
    def configured(cls, name: str, section: Any, settings: Settings, cache: Path) -> Mme:
        return cls(Path(section.questions), cache, settings)

    def read(self) -> list[Question]:
        """The questions, task by task, the two of an image side by side."""
        faults: list[str] = []
        questions = list(self._in_parquet(faults) if self._is_parquet else self._in_folder(faults))
        refuse(faults, f"mme: what cannot be used in {self.folder}:", "Download the benchmark again.")
        pairs: dict[str, int] = defaultdict(int)
        for question in questions:
            pairs[question.tags["pair"]] += 1
        alone = [f"{pair} ({n})" for pair, n in pairs.items() if n != 2]
        refuse(alone, f"mme: images in {self.folder} that do not have exactly two questions:", "Repair the files.")
        return questions

    def _in_folder(self, faults: list[str]) -> Iterator[Question]:
        for task in self._tasks:
            texts = self.folder / task / "questions_answers_YN"
            texts, images = (texts, f"{task}/images") if texts.is_dir() else (self.folder / task, task)
            for file in sorted(texts.glob("*.txt")):
                names = (f"{images}/{file.stem}{suffix}" for suffix in _IMAGES)
                image = next((name for name in names if (self.folder / name).is_file()), f"{images}/{file.stem}.jpg")
                yield from _pair(task, image, file, faults)

    def _in_parquet(self, faults: list[str]) -> Iterator[Question]:
        pictures = Pictures(self.image_root)
        asked: Counter[str] = Counter()
        files = parquet_files(self.folder) if self.folder.is_file() else sorted(self.folder.glob("**/*.parquet"))
        if not files:
            raise DataError(
                f"mme: {self.folder} holds no folder of a task ({', '.join(PERCEPTION[:3])}, ...) and no parquet file.",
                advice="Give the folder MME_Benchmark_release_version.",
            )
        for file in files:
            columns = ("question_id", "image", "question", "answer", "category")
            for place, row in enumerate(read_parquet(file, columns)):
                content = image_bytes(row["image"])
                try:
                    if content is None:
                        raise ValueError("no image")
                    pair = f"{row['category']}/{row['question_id']}"
                    asked[pair] += 1
                    question = str(row["question"]), str(row["answer"])
                    yield _question(str(row["category"]), pair, pictures.keep(content), *question, asked[pair])
                except ValueError as error:
                    faults.append(f"{file.name}, row {place}: {error}")

    def first(self, questions: list[Question], n: int) -> list[Question]:
        """The first n questions, and the other one about the last one's image."""
        wanted = {question.tags["pair"] for question in questions[:n]}
        return [question for question in questions if question.tags["pair"] in wanted]

    def rephrased(self, texts: Mapping[str, str]) -> Benchmark:
        """As any benchmark's; an image's two questions are scored together, so both must be rephrased.

        Raises:
            DataError: as any benchmark's, or one of two is missing.
        """
        changed = super().rephrased(texts)
        pairs = Counter(question.tags["pair"] for question in changed.questions)
        alone = [pair for pair, n in pairs.items() if n != 2]
        refuse(alone, f"{self.name}: images of whose two questions only one is rephrased:", "Rephrase both.")
        return changed

    def score(self, prediction: str, question: Question) -> float:
        """1 where yes or no, as MME reads it, is right."""
        return float(mme_yes_no(prediction) == question.answers[0])

    def reading(self, prediction: str, question: Question) -> dict[str, Any]:
        """``said``: yes, no or neither."""
        return {"said": mme_yes_no(prediction)}

    def further(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """MME's scores (points, not shares) and those of a classifier.

        ``score[task]`` 0..200: percent of right questions plus percent of images with both right. ``perception``
        0..2000 and ``cognition`` 0..800 are their sums, there if every task of the kind was asked.
        """
        pairs: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for row in rows:
            question = self.by_id[row["question_id"]]
            pairs[question.question_type][question.tags["pair"]].append(row["score"])
        points = {
            task: 100 * mean(mean(scores) + float(min(scores) == 1) for scores in found.values())
            for task, found in pairs.items()
        }
        metrics = {f"score[{task}]": value for task, value in sorted(points.items())}
        for name, tasks in (("perception", PERCEPTION), ("cognition", COGNITION)):
            if set(tasks) <= set(points):
                metrics[name] = sum(points[task] for task in tasks)
        both = mean(float(min(scores) == 1) for found in pairs.values() for scores in found.values())
        return metrics | {"accuracy_plus": both} | yes_no_metrics(rows)


def yes_no_metrics(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Precision, recall and F1 of "yes", macro F1, the confusion matrix, and the share of answers that are neither."""
    said, wanted = [row["said"] for row in rows], [row["answers"][0] for row in rows]
    yes = class_scores(said, wanted).get("yes")
    metrics = {} if yes is None else {"precision": yes.precision, "recall": yes.recall, "f1": yes.f1}
    matrix = confusion_matrix(said, wanted)
    return metrics | {
        "macro_f1": macro_f1(said, wanted),
        "yes_share": said.count("yes") / len(said),
        "neither_share": said.count(NEITHER) / len(said),
        **{f"confusion[{gold} read as {given}]": float(n) for (gold, given), n in sorted(matrix.items())},
    }


def _pair(task: str, image: str, file: Path, faults: list[str]) -> Iterator[Question]:
    try:
        lines = [line for line in read_text(file, MAX_PAIR_BYTES).removeprefix("\ufeff").splitlines() if line.strip()]
        for place, line in enumerate(lines, 1):
            question, _, answer = line.rpartition("\t")
            yield _question(task, image, image, question, answer, place)
    except (OSError, ValueError) as error:
        faults.append(f"{task}/{file.name}: {error}")


def _question(task: str, pair: str, image: str, text: str, answer: str, place: int) -> Question:
    answer = answer.strip().rstrip(".").lower()
    if answer not in ("yes", "no") or not text.strip():
        raise ValueError(f"a question and Yes or No are needed, not {text[:40]!r} and {answer[:20]!r}")
    bare = text.strip().replace(_IN_FILE, "")
    return Question(
        question_id=f"{pair}#{place}",
        image_id=pair,
        image=image,
        question=bare,
        prompt=f"{bare}\n{INSTRUCTION}",
        question_type=task,
        answers=(answer,),
        tags={"pair": pair},
    )
