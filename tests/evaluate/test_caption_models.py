"""METEOR and BERTScore: what they need, and that they give what their authors' programs give."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
from benchmark_files import MAKERS

from mgm_exp.errors import MissingDependencyError, ModelError
from mgm_exp.evaluate import meteor as meteor_module
from mgm_exp.evaluate.bertscore import bertscore
from mgm_exp.evaluate.meteor import meteor

GOLDEN = Path(__file__).parents[1] / "data" / "eval" / "caption_metrics.json"
WORDS = "a the red blue dog cat sits on mat runs fast".split()


def test_meteor_without_its_program_says_what_it_needs(benchmark_of, tmp_path, monkeypatch):
    monkeypatch.setattr(meteor_module.shutil, "which", lambda name: None)
    keys = MAKERS["captions"](tmp_path)
    with pytest.raises(MissingDependencyError, match=r"meteor=true needs Java.*metrics-java"):
        benchmark_of("captions", **keys, meteor=True)
    assert benchmark_of("captions", **keys).metric_version == "coco-caption-1"


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which("java") and importlib.util.find_spec("pycocoevalcap")), reason="needs Java and pycocoevalcap"
)
def test_meteor_agrees_with_pycocoevalcap():
    data = json.loads(GOLDEN.read_text(encoding="utf-8"))
    tokens, expected = data["ptb_tokenised"], data["expected"]["pycocoevalcap_ptb_tokens"]["meteor"]["corpus"]
    images = list(tokens["hypotheses"])
    score = meteor([tokens["hypotheses"][k] for k in images], [tokens["references"][k] for k in images])
    assert score == pytest.approx(expected, abs=1e-9)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A tiny random BERT in a folder."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    BertTokenizer(str(folder / "vocab.txt"), model_max_length=64).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=16,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=64,
        initializer_range=1.0,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def test_bertscore_matches_every_token_with_its_most_similar_one(encoder):
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(encoder), AutoModel.from_pretrained(encoder).eval()

    def states(text: str) -> torch.Tensor:
        with torch.no_grad():
            found = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states[2][0]
        return found / found.norm(dim=-1, keepdim=True)

    given, wanted = "the red dog runs", "a blue cat sits on the mat"
    similarity = states(given) @ states(wanted).T
    precision = similarity.max(dim=1).values[1:-1].mean().item()
    recall = similarity.max(dim=0).values[1:-1].mean().item()
    expected = 2 * precision * recall / (precision + recall)
    assert bertscore([given], [[wanted]], encoder, 2) == pytest.approx(expected, abs=1e-5)
    assert bertscore([given], [[wanted, given]], encoder, 2) == pytest.approx(1.0, abs=1e-5)
    assert bertscore([given, ""], [[given], [wanted]], encoder, 2) == pytest.approx(0.5, abs=1e-5)


def test_bertscore_refuses_what_is_no_encoder(encoder, tmp_path):
    with pytest.raises(ModelError, match="has 3 layers"):
        bertscore(["a"], [["a"]], encoder, 17)
    with pytest.raises(ModelError, match="cannot be loaded"):
        bertscore(["a"], [["a"]], tmp_path, 1)


def test_the_encoder_is_part_of_a_captions_result(encoder, benchmark_of, tmp_path):
    keys = MAKERS["captions"](tmp_path)
    plain = benchmark_of("captions", **keys)
    scored = benchmark_of("captions", **keys, bertscore=str(encoder), bertscore_layer=2)
    assert scored.fingerprint() != plain.fingerprint()
    rows = [
        {"question_id": q.question_id, "question_type": "caption", "prediction": "a red dog", "answers": q.answers}
        for q in scored.questions
    ]
    assert "bertscore" in scored.further(rows)
