"""Image captions against the references of a COCO file: CIDEr-D, BLEU-4, ROUGE-L; METEOR and BERTScore on request."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mgm_exp.evaluate.benchmarks.base import Benchmark, Question, Settings, Source, Submission, refuse
from mgm_exp.evaluate.metrics import bleu4, caption_tokens, cider, rouge_l
from mgm_exp.evaluate.readers import read_json_object


class Captions(Benchmark):
    """One caption for each image; an image's score is ROUGE-L, whose mean is the corpus score.

    Args:
        annotations: ``{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}``. Without
            annotations only a submission file is made.
        image_root: Folder of the images.
        prompt: What the model is asked.
        settings: Batch size and limits.
        meteor: Also METEOR (Java and the package pycocoevalcap).
        bertscore: Also BERTScore by the encoder in this folder; the second is the hidden layer.
    """

    name = "captions"
    metric_version = "coco-caption-1"
    sources = (
        Source("annotations", "file", "captions_val2014.json"),
        Source("images", "folder", "the folder of COCO images"),
        Source("bertscore", "folder", "a local folder of the encoder, such as roberta-large", is_needed=False),
    )

    def __init__(
        self,
        annotations: Path,
        image_root: Path,
        prompt: str,
        settings: Settings,
        *,
        meteor: bool = False,
        bertscore: tuple[Path, int] | None = None,
    ) -> None:
        super().__init__(image_root, settings)
        self.annotation_file, self.prompt, self.meteor, self.bertscore = Path(annotations), prompt, meteor, bertscore
        self.split = self.annotation_file.stem
        if meteor:
            from mgm_exp.evaluate.meteor import require_meteor

            require_meteor()
            self.metric_version += "+meteor-1.5"
        if bertscore is not None:
            self.metric_version += f"+bertscore-{bertscore[1]}"

    @classmethod
    def configured(cls, name: str, section: Any, settings: Settings, cache: Path) -> Captions:
        bertscore = (Path(section.bertscore), section.bertscore_layer) if section.bertscore else None
        return cls(
            Path(section.annotations),
            Path(section.images),
            section.prompt,
            settings,
            meteor=section.meteor,
            bertscore=bertscore,
        )

    def files(self) -> list[Path]:
        """The encoder of BERTScore."""
        return sorted(path for path in self.bertscore[0].iterdir() if path.is_file()) if self.bertscore else []

    def read(self) -> list[Question]:
        """One question for each image, in the order of the file."""
        content = read_json_object(self.annotation_file, ["images"])
        references: dict[Any, list[str]] = defaultdict(list)
        faults = []
        for place, row in enumerate(content.get("annotations") or []):
            if not isinstance(row, dict) or not isinstance(row.get("caption"), str) or "image_id" not in row:
                faults.append(f"annotation {place}: image_id and caption are needed")
            else:
                references[row["image_id"]].append(row["caption"])
        questions = []
        for place, row in enumerate(content["images"]):
            if not isinstance(row, dict) or not isinstance(row.get("file_name"), str) or "id" not in row:
                faults.append(f"image {place}: id and file_name are needed")
            elif references and row["id"] not in references:
                faults.append(f"image {row['id']}: no caption")
            else:
                questions.append(self._question(row, references.get(row["id"], [])))
        refuse(
            faults, f"captions: entries of {self.annotation_file} that cannot be used:", "Is it a COCO caption file?"
        )
        return questions

    def _question(self, row: Mapping[str, Any], references: Sequence[str]) -> Question:
        return Question(
            question_id=row["id"],
            image_id=str(row["id"]),
            image=row["file_name"],
            question=self.prompt,
            prompt=self.prompt,
            question_type="caption",
            answers=tuple(references),
        )

    def score(self, prediction: str, question: Question) -> float:
        """ROUGE-L of one caption."""
        return rouge_l([caption_tokens(prediction)], [[caption_tokens(text) for text in question.answers]])

    def further(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Corpus scores; CIDEr-D is about 0..10 (papers show it times 100), BERTScore may be below 0."""
        predictions = [caption_tokens(row["prediction"]) for row in rows]
        references = [[caption_tokens(text) for text in row["answers"]] for row in rows]
        scores = {
            "cider": cider(predictions, references),
            "bleu4": bleu4(predictions, references),
            "rouge_l": rouge_l(predictions, references),
        }
        if self.meteor:
            from mgm_exp.evaluate.meteor import meteor

            scores["meteor"] = meteor(predictions, references)
        if self.bertscore is not None:
            from mgm_exp.evaluate.bertscore import bertscore

            texts = [row["prediction"] for row in rows], [list(row["answers"]) for row in rows]
            scores["bertscore"] = bertscore(*texts, *self.bertscore)
        return scores

    def submission(self, rows: Sequence[Mapping[str, Any]]) -> Submission:
        """COCO's form: ``[{"image_id", "caption"}]``."""
        answers = [{"image_id": row["question_id"], "caption": row["prediction"]} for row in rows]
        return Submission(f"{self.split}_results.json", json.dumps(answers, ensure_ascii=False).encode())
