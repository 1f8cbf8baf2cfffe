"""Text statistics of 400,000 captions: ours, and Data-Juicer's analyzer on the same rows.

Both run in one process with one thread. The five values are those whose definitions agree: words, characters, share of
special characters, repetition of words and of characters. Data-Juicer is imported and its rows are in memory before the
clock starts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.captions import captions, write_rows
from benchmarks.measurement import Row, timed

N, N_QUICK = 400_000, 5_000
NGRAM = 10
FILTERS: dict[str, dict[str, Any]] = {
    "words_num_filter": {"lang": "en", "tokenization": False},
    "text_length_filter": {},
    "special_characters_filter": {},
    "word_repetition_filter": {"lang": "en", "tokenization": False, "rep_len": NGRAM},
    "character_repetition_filter": {"rep_len": NGRAM},
}
ROUNDING = 0.5001e-10
"""Data-Juicer keeps its values as JSON with 10 decimals."""
STATS = ("num_words", "text_len", "special_char_ratio", "word_rep_ratio", "char_rep_ratio")


def run(work: Path, quick: bool) -> list[Row]:
    """Measures both, and compares every value of every caption."""
    texts = captions(N_QUICK if quick else N)
    peer_s, analysis_s, theirs = _analyzer(work, texts)

    from mgm_exp.data.exploration.caption_table import measure_captions

    measure_captions(texts[:1000], word_n=(NGRAM,), character_n=(NGRAM,))  # loads what is loaded on first use
    ours_s, table = timed(lambda: measure_captions(texts, word_n=(NGRAM,), character_n=(NGRAM,)))
    ours = {
        "num_words": table.words,
        "text_len": table.text_length,
        "special_char_ratio": table.special_characters,
        "word_rep_ratio": table.word_repetition[NGRAM],
        "char_rep_ratio": table.character_repetition[NGRAM],
    }
    exactness = _compared(ours, theirs, len(texts))
    whole_s, explored = _explored(work, texts)
    return [
        Row(
            "text statistics: values of every caption",
            "s",
            ours_s,
            peer_s,
            20.0,
            exactness,
            f"{len(texts):,} captions in memory, one process each; five values a caption; "
            "measure_captions, and the analyzer's operators (np=1)",
        ),
        Row(
            "text statistics: from a file to the finished report",
            "s",
            whole_s,
            analysis_s,
            None,
            f"rows {explored['rows']:,}; our report also holds diversity with intervals, near-duplicates, languages, "
            "n-grams; the analyzer's the five values' mean, spread and percentiles",
            f"the same {len(texts):,} rows as JSON lines; mgm-exp explore without images on all cores; Analyzer.run "
            "with np=1 and without its plots",
        ),
    ]


def _analyzer(work: Path, texts: list[str]) -> tuple[float, float, dict[str, Any]]:
    """Seconds of the analyzer's operators, of its whole run, and the values."""
    from mgm_exp.data.data_juicer import guards

    guards.apply()
    import yaml
    from data_juicer.config import init_configs
    from data_juicer.core import Analyzer
    from data_juicer.core.data import NestedDataset
    from data_juicer.ops import load_ops
    from datasets import Dataset

    from mgm_exp.data.data_juicer.emit import STATS as COLUMN
    from mgm_exp.data.data_juicer.emit import base_settings

    plain = work / "captions.jsonl"
    _write_captions(plain, texts)
    process = [{name: parameters} for name, parameters in FILTERS.items()]
    settings = {**base_settings("default", 1), "dataset_path": str(plain), "process": process}
    config = work / "analyze.yaml"
    config.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    arguments = ["--config", str(config), "--export_path", str(work / "analyzed" / "out.jsonl")]

    cfg = init_configs(arguments)
    table = NestedDataset(Dataset.from_dict({"text": texts}))
    operators = load_ops(cfg.process)

    def measured() -> Any:
        done = table
        for operator in operators:
            operator.process, kept = None, operator.process
            done = done.process(operator, work_dir=cfg.work_dir, open_monitor=False)
            operator.process = kept
        return done

    peer_s, done = timed(measured)
    stats = done.select_columns([COLUMN]).to_list()
    theirs = {name: [row[COLUMN][name] for row in stats] for name in STATS}
    analyzer = Analyzer(init_configs(arguments))
    analysis_s, _ = timed(lambda: analyzer.run(skip_export=True))
    return peer_s, analysis_s, theirs


def _write_captions(path: Path, texts: list[str]) -> None:
    import json

    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)


def _compared(ours: dict[str, Any], theirs: dict[str, Any], n: int) -> str:
    import numpy as np

    worst = {name: float(np.abs(np.asarray(ours[name]) - np.asarray(theirs[name])).max()) for name in STATS}
    differing = [f"{name} by up to {difference:.3g}" for name, difference in worst.items() if difference > ROUNDING]
    if differing:
        return f"DIFFERENT values of {n:,} captions: {', '.join(differing)}"
    if any(worst.values()):
        return f"all {len(STATS)} values of all {n:,} captions are equal, as far as Data-Juicer keeps digits (10)"
    return f"all {len(STATS)} values of all {n:,} captions are equal bit by bit"


def _explored(work: Path, texts: list[str]) -> tuple[float, dict[str, Any]]:
    from mgm_exp.data import find_source
    from mgm_exp.data.exploration import Options, explore

    rows = write_rows(work / "rows.jsonl", texts, "{}.jpg")
    seconds, found = timed(lambda: explore(find_source(rows), Options(with_images=False)))
    return seconds, found.content
