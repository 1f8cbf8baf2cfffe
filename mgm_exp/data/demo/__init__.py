"""The generated demo data: scene-text images with captions and questions (see docs/demo.md)."""

from mgm_exp.data.demo.captions import raw_caption, read_caption, rich_caption, score_caption
from mgm_exp.data.demo.dataset import DATASET_NAME, DemoManifest, write_demo
from mgm_exp.data.demo.questions import QUESTION_TYPES, Question, question_only_answers, questions_of
from mgm_exp.data.demo.scenes import GENERATOR_VERSION, Item, Scene, render_scene, sample_scene

__all__ = [
    "DATASET_NAME",
    "GENERATOR_VERSION",
    "QUESTION_TYPES",
    "DemoManifest",
    "Item",
    "Question",
    "Scene",
    "question_only_answers",
    "questions_of",
    "raw_caption",
    "read_caption",
    "render_scene",
    "rich_caption",
    "sample_scene",
    "score_caption",
    "write_demo",
]
