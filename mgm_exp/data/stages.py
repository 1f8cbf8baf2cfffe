"""The stages before training: where rows come from, and demo, check, recaption, measure and curate as the store runs
them.

    origins(config, demo)["instruct"].image_root

Each ``make_*`` function fills ``work/out`` and returns the meta data of its store entry.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from mgm_exp.config import DataConfig, ExperimentConfig, ModelFamily, RecipeEngine
from mgm_exp.data.augmentation import Augmentation
from mgm_exp.data.caption_choice import CaptionChoice, is_answer_row
from mgm_exp.data.captioner import captioner_accuracy
from mgm_exp.data.captioner.accuracy import in_words as accuracy_in_words
from mgm_exp.data.conversations import to_record
from mgm_exp.data.curation import Policy, Recaptioned, Selection, Source, curate
from mgm_exp.data.curation_page import write_page
from mgm_exp.data.formats import find_source, read_rows
from mgm_exp.data.image_table import ImageTable, write_image_tables
from mgm_exp.data.recaptioning import CAPTIONS, Captioner, Scorer, recaption
from mgm_exp.data.recaptioning import FATES as CAPTION_FATES
from mgm_exp.data.recaptioning import REJECTED as REJECTED_CAPTIONS
from mgm_exp.data.recipe import VALUES, resolve
from mgm_exp.data.records import BadRow, json_line
from mgm_exp.errors import DataError

Progress = Callable[[str, int, int], None]
"""Told how far a stage is: (what, done, total)."""


@dataclass(frozen=True)
class Origin:
    """A file of rows and the folder that its image paths are relative to."""

    path: Path
    image_root: Path


def user_origins(config: ExperimentConfig) -> dict[str, Origin]:
    """The files that the configuration names; a stage that is missing here uses the generated demo data.

    Raises:
        DataError: a file or a folder is not there, or the file is empty.
    """
    data, found = config.data, {}
    if data.path is not None:
        found["align"] = _origin("data", data.path, data.image_root)
    if data.instruct.path is not None:
        found["instruct"] = _origin("data.instruct", data.instruct.path, data.instruct.image_root)
    elif "align" in found:
        found["instruct"] = found["align"]
    if config.model.family is ModelFamily.hf and "instruct" in found:
        found["align"] = found["instruct"]  # no stage reads them; so they are not read, checked or counted twice
    return found


def origins(config: ExperimentConfig, demo: Path | None, captions: Path | None = None) -> dict[str, Origin]:
    """Where the rows of ``align`` and ``instruct`` are read from.

    Args:
        config: Names the user's files.
        demo: Folder of the generated demo data, for the stages that the user gave no file for.
        captions: Folder of the recaption stage: its rows take the place of the align rows.
    """
    found = user_origins(config)
    if demo is not None:
        found.setdefault("instruct", Origin(demo / "instruct.json", demo))
        is_one_stage = config.model.family is ModelFamily.hf
        rows = found["instruct"] if is_one_stage else Origin(demo / "captions_raw.jsonl", demo)
        found.setdefault("align", rows)
    align = found["align"]
    if captions is not None:
        found["align"] = Origin(captions / CAPTIONS, align.image_root)
    elif config.data.recaptioned_path is not None:
        given = _origin("data.recaptioned", config.data.recaptioned_path, str(align.image_root))
        found["align"] = Origin(given.path, align.image_root)
    return {"align": found["align"], "instruct": found["instruct"]}


def make_demo(config: ExperimentConfig, work: Path, on_progress: Progress) -> dict[str, Any]:
    """Generates the demo's scenes, captions and questions."""
    from dataclasses import asdict

    from mgm_exp.data.demo import write_demo

    manifest = write_demo(
        work / "out",
        n_train=config.data.demo_images,
        n_val=config.data.demo_questions * 2 // 3,
        n_test=config.data.demo_questions,
        seed=config.data.demo_seed,
        progress=lambda done, total: on_progress("generated images", done, total),
    )
    return {key: value for key, value in asdict(manifest).items() if key != "folder"}


def make_captions(
    config: ExperimentConfig,
    captioner: Captioner,
    scorer: Scorer | None,
    work: Path,
    demo: Path | None,
    on_progress: Progress,
) -> dict[str, Any]:
    """Writes new captions for the images of the align stage; an interrupted pass goes on at its last batch.

    Args:
        captioner: Writes them.
        scorer: The judge of ``keep_if_better``; None under other policies.
    """
    data = config.data
    origin = origins(config, demo)["align"]
    report = recaption(
        read_rows(origin.path, rename_duplicates=True),
        captioner,
        image_root=origin.image_root,
        work=work,
        out=work / "out",
        choice=CaptionChoice.of_section(data.captioner),
        scorer=scorer,
        batch_size=data.captioner.batch_size,
        max_megapixels=data.max_megapixels,
        max_samples=data.max_samples,
        total=_count_rows(origin.path, data.max_samples),
        on_progress=on_progress,
    )
    meta = {"captioner": captioner.name, **report.to_json()}
    if demo is not None and origin.image_root == demo:
        meta["accuracy"] = captioner_accuracy(work / "out" / CAPTIONS, demo / "specs.jsonl")
    return meta


def make_checked(config: ExperimentConfig, work: Path, demo: Path | None, on_progress: Progress) -> dict[str, Any]:
    """Decodes every image once; all later stages look its verdict up."""
    sources = {stage: (origin.path, origin.image_root) for stage, origin in origins(config, demo).items()}
    data = config.data
    return write_image_tables(
        sources,
        work / "out",
        max_megapixels=data.max_megapixels,
        max_samples=data.max_samples,
        on_progress=on_progress,
    )


def make_values(
    config: ExperimentConfig,
    work: Path,
    demo: Path | None,
    captions: Path | None,
    checked: Path,
    on_progress: Progress,
) -> dict[str, Any]:
    """Computes the values of the recipe's operators for every usable pair of the align stage."""
    from mgm_exp.data import data_juicer

    recipe, origin = config.data.recipe, origins(config, demo, captions)["align"]
    verdicts = ImageTable(checked, "align", origin.image_root)
    out = work / "out"
    pairs = out / "pairs.jsonl"
    total = _write_pairs(origin.path, verdicts, config.data.max_samples if captions is None else None, pairs)
    operators = data_juicer.operators_of(recipe)
    if recipe.engine is RecipeEngine.builtin:
        report = data_juicer.measure_builtin(
            pairs, origin.image_root, operators, out=out, on_progress=on_progress, total=total
        )
    else:
        report = data_juicer.measure(
            pairs,
            origin.image_root,
            operators,
            work=work,
            out=out,
            executor=recipe.executor.value,
            processes=recipe.processes,
            on_progress=on_progress,
        )
    return report.to_json()


def _write_pairs(path: Path, verdicts: ImageTable, most: int | None, pairs: Path) -> int:
    """The pairs that operators see: id, caption without special tokens, image. Returns their number."""
    count = 0
    with open(pairs, "w", encoding="utf-8", newline="\n") as file:
        for row in islice(read_rows(path, rename_duplicates=True), most):
            made = None if isinstance(row, BadRow) else to_record(row)
            if made is None or isinstance(made, BadRow):
                continue
            record = made[0]
            if record.image is None or len(record.conversations) != 2 or verdicts.verdict(record.image).kind:
                continue
            if is_answer_row(record.id):  # an answer of one word is no short caption
                continue
            caption = record.conversations[1].text
            file.write(json_line({"id": record.id, "caption": caption, "image": record.image}))
            count += 1
    return count


def make_curated(
    config: ExperimentConfig,
    processors: dict[str, Any],
    work: Path,
    demo: Path | None,
    captions: Path | None,
    checked: Path,
    values: Path | None,
    recaption: dict[str, Any] | None,
    on_progress: Progress,
) -> dict[str, Any]:
    """Checks every row of both stages; what cannot be used is counted, named and left out (or fatal).

    Args:
        processors: The model's processor for ``align`` and ``instruct``, each with its ``model_max_length``.
        captions, checked, values: Folders of the stages before; None where a stage is not part of the run.
        recaption: What the recaption stage says of itself.
    """
    data = config.data
    given = origins(config, demo)
    sources = {
        stage: Source(
            origin.path,
            origin.image_root,
            processors[stage],
            name=given[stage].path.name,
            recaptioned=_recaptioned(captions) if captions is not None and stage == "align" else None,
            selection=_selection(data, values) if stage == "align" else Selection(),
            verdicts=ImageTable(checked, stage, origin.image_root),
        )
        for stage, origin in origins(config, demo, captions).items()
    }
    policy = Policy(data.bad_rows.value, data.max_bad_share, data.max_samples, data.max_megapixels)
    out = work / "out"
    report = curate(sources, out, policy=policy, on_progress=on_progress)
    images = {stage: source.image_root for stage, source in sources.items()}
    write_page(out, name=data.name, images=images, recaption=recaption, max_megapixels=data.max_megapixels)
    return report.to_json()


def _recaptioned(captions: Path) -> Recaptioned:
    """The account of the recaption stage."""
    fates = captions / CAPTION_FATES
    with open(fates, encoding="utf-8") as file:
        counts = Counter(json.loads(line)["fate"] for line in file)
    return Recaptioned(captions / REJECTED_CAPTIONS, fates, counts["changed"], counts["added"])


def _selection(data: DataConfig, values: Path | None) -> Selection:
    """The recipe for the align stage's pairs."""
    path = None if values is None else values / VALUES
    augment = data.augment
    return Selection(path, resolve(data.recipe, path), Augmentation(augment.duplicate, augment.paraphrase))


def captions_in_words(meta: dict[str, Any]) -> list[str]:
    """What recaptioning did: a sentence, and one on its accuracy where the images' content is known."""
    counts = {"recaptioned": "got new captions", "kept_raw": "keep their own", "unchanged": "are no pairs",
              "rejected": "cannot be used", "added": "were added"}  # fmt: skip
    found = ", ".join(f"{meta[key]} {words}" for key, words in counts.items() if meta[key])
    why = ", ".join(f"{count} {reason}" for reason, count in meta["why_kept"].items())
    sentences = [f"captions by {meta['captioner']}: of {meta['rows']} rows {found}" + (f" ({why})" if why else "")]
    if "accuracy" in meta:
        sentences.append(accuracy_in_words(meta["accuracy"], meta["captioner"]))
    return sentences


def in_words(report: dict[str, Any], stages: Sequence[str] = ("align", "instruct")) -> list[str]:
    """What curation did, one sentence a stage."""
    sentences = []
    for stage in stages:
        found = report[stage]
        rejected = ", ".join(f"{count} {kind}" for kind, count in sorted(found["rejected"].items()))
        dropped = ", ".join(f"{count} by {operator}" for operator, count in found["dropped"].items() if count)
        sentences.append(
            f"{stage} data: {found['kept']} rows of the {found['rows']} of {found['file']} are used"
            + (f"; dropped by the recipe: {dropped}" if dropped else "")
            + (f"; rejected: {rejected} (rejected.jsonl names them)" if rejected else "")
        )
    return sentences


def _origin(key: str, path: str, root: str | None) -> Origin:
    folder = Path(root).expanduser() if root else None
    if folder is not None and not folder.is_dir():
        raise DataError(
            f"{key}.image_root={root} is not a folder.", advice="It is the folder that image paths are relative to."
        )
    try:
        found = find_source(Path(path).expanduser(), folder)
    except DataError as error:
        raise DataError(
            f"{key}.path={path}: {error.message}",
            advice=error.advice or f"Check the path, or leave {key}.path out to use the generated demo data.",
        ) from error
    return Origin(found.path.resolve(), found.image_root.resolve())


def _count_rows(path: Path, most: int | None) -> int:
    total = sum(1 for _ in read_rows(path, rename_duplicates=True))
    return total if most is None else min(total, most)
