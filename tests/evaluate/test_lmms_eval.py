"""The model as lmms-eval asks it.

lmms-eval is no dependency: its base class and its requests are reproduced here, with the abstract methods, signatures
and arguments of lmms_eval/api/model.py, api/instance.py and ConfigurableTask.construct_requests (0.6.1 to 0.7.3).
"""

from __future__ import annotations

import abc
import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mgm_exp.errors import ConfigError, ModelError
from mgm_exp.evaluate.ask import ask

MGM = Path(__file__).parents[1] / "data" / "mgm"
COLOURS = [(200, 30, 30), (20, 160, 60), (30, 60, 220)]


class StandIn(abc.ABC):
    """lmms_eval.api.model.lmms: what an evaluator relies on."""

    is_simple = True

    def __init__(self) -> None:
        self._rank, self._world_size = 0, 1
        self.cache_hook = types.SimpleNamespace(add_partial=lambda *_: None)
        self.task_dict: dict[str, Any] = {}

    @abc.abstractmethod
    def loglikelihood(self, requests): ...

    @abc.abstractmethod
    def generate_until(self, requests): ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests): ...


class Request:
    """lmms_eval.api.instance.Instance, of which models read ``args``."""

    def __init__(self, *args: Any) -> None:
        self.args = args


@pytest.fixture(scope="module")
def lmms_model() -> Any:
    modules = {name: types.ModuleType(name) for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.utils")}
    base = types.ModuleType("lmms_eval.api.model")
    base.lmms = StandIn  # type: ignore[attr-defined]
    split = lambda text: dict(part.split("=", 1) for part in text.split(",") if part)  # noqa: E731
    modules["lmms_eval.utils"].simple_parse_args_string = split  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        for name, module in {**modules, "lmms_eval.api.model": base}.items():
            patch.setitem(sys.modules, name, module)
        patch.delitem(sys.modules, "mgm_exp.evaluate.lmms_eval.model", raising=False)
        from mgm_exp.evaluate.lmms_eval.model import MgmExp

        model = MgmExp.create_from_arg_string(
            f"pretrained={MGM / 'model'},batch_size=4", {"batch_size": 1, "max_batch_size": None, "device": "cpu"}
        )
        model.task_dict = {"t": {"test": [{"k": k, "answer": "red"} for k in range(6)]}}
        yield model
        sys.modules.pop("mgm_exp.evaluate.lmms_eval.model", None)


def picture(doc: dict[str, Any]) -> list[Image.Image]:
    return [Image.new("RGB", (40 + 9 * doc["k"], 60), COLOURS[doc["k"] % 3])]


def nothing(doc: dict[str, Any]) -> list[Image.Image]:
    return []


def asked(k: int, text: str = "What is it?", visual: Any = picture, **settings: Any) -> Request:
    return Request(text, {"max_new_tokens": 5, **settings}, visual, k, "t", "test")


def test_it_is_registered_under_its_name_and_arguments_of_the_model_win(lmms_model):
    assert lmms_model.batch_size == 4 and lmms_model.is_simple
    manifests = types.ModuleType("lmms_eval.models.registry_v2")
    manifests.ModelManifest = lambda **given: given  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "lmms_eval.models", types.ModuleType("lmms_eval.models"))
        patch.setitem(sys.modules, "lmms_eval.models.registry_v2", manifests)
        from mgm_exp.evaluate.lmms_eval import manifest

        found = manifest()
    assert (found["model_id"], found["simple_class_path"]) == ("mgm_exp", "mgm_exp.evaluate.lmms_eval.model.MgmExp")
    pyproject = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert 'mgm_exp = "mgm_exp.evaluate.lmms_eval:manifest"' in pyproject


def test_batched_answers_are_those_of_one_question_at_a_time_and_in_order(lmms_model, model, processor):
    requests = [asked(k, f"What{' is' * k} it?") for k in range(6)] + [
        asked(0, "Why?", nothing),
        asked(1, max_new_tokens=2),
    ]
    answers = lmms_model.generate_until(requests)
    for k in range(6):
        alone = ask(model, processor, picture({"k": k})[0], f"What{' is' * k} it?", 5)
        assert answers[k] == alone
    assert len(set(answers)) > 1 and isinstance(answers[6], str)


def test_an_answer_ends_at_a_stop_string_and_sampling_is_obeyed(lmms_model):
    [whole] = lmms_model.generate_until([asked(2, max_new_tokens=12)])
    stop = whole[len(whole) // 2 : len(whole) // 2 + 2]
    steps = []
    generate = lmms_model.model.generate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lmms_model.model, "generate", lambda *a, **k: steps.append(generate(*a, **k)) or steps[-1])
        [cut] = lmms_model.generate_until([asked(2, max_new_tokens=12, until=[stop, "never"])])
        assert cut == whole[: whole.index(stop)].strip()
        assert steps[0].shape[1] < 12  # it did not go on to the end
        torch.manual_seed(1)
        sampled = lmms_model.generate_until([asked(2, max_new_tokens=12, temperature=5.0)])
        assert sampled != [whole]
        assert lmms_model.generate_until([asked(2, max_new_tokens=12, temperature=0)]) == [whole]


def by_hand(model: Any, processor: Any, k: int, question: str, answer: str) -> tuple[float, bool]:
    """Log-probability of an answer, one forward pass over the whole row."""
    ids = processor.encode_prompt(question)
    target = processor.tokenizer.encode(answer, add_special_tokens=False)
    low, high = processor.pixels(picture({"k": k})[0])
    with torch.no_grad():
        logits = model(torch.tensor([[*ids, *target]]), images=low[None], images_aux=high[None]).logits[0]
    before = logits[-len(target) - 1 : -1].log_softmax(-1)
    return float(sum(before[i, t] for i, t in enumerate(target))), before.argmax(-1).tolist() == target


def test_likelihoods_are_those_of_a_plain_forward_pass(lmms_model, model, processor):
    options = ["red", " a long green sign", "blue and white"]
    greedy = lmms_model.generate_until([asked(1, "Which?", max_new_tokens=1)])[0]
    requests = [Request("Which?", option, picture, k, "t", "test") for k in (0, 1) for option in (*options, greedy)]
    requests.append(Request("Which?", lambda doc: doc["answer"], picture, 0, "t", "test"))
    found = lmms_model.loglikelihood(requests)
    for (number, is_greedy), request in zip(found, requests, strict=True):
        _, answer, _, k, _, _ = request.args
        text = answer({"answer": "red"}) if callable(answer) else answer.strip()
        wanted, is_likeliest = by_hand(model, processor, k, "Which?", text)
        # lmms-eval takes the smallest number of a multiple-choice task's options, which are given as texts
        assert number == pytest.approx(wanted if callable(answer) else -wanted, abs=2e-4)
        assert is_greedy == is_likeliest and wanted < 0 and math.isfinite(wanted)


def test_rounds_go_on_until_the_task_says_stop(lmms_model):
    told = []

    def next_round(doc, previous_output, round_idx, previous_round_info):
        told.append((doc["k"], round_idx, list(previous_output), previous_round_info))
        is_over = round_idx > doc["k"]
        return None if is_over else picture(doc), f"And {previous_output[-1]}?", is_over, [*previous_output], round_idx

    requests = [Request("What?", {"max_new_tokens": 3}, picture, next_round, k, "t", "test") for k in (0, 2)]
    first, second = lmms_model.generate_until_multi_round(requests)
    assert (len(first), len(second)) == (1, 3) and all(isinstance(one, str) for one in second)
    assert [(k, number, info) for k, number, _, info in told] == [(0, 1, None), (2, 1, None), (2, 2, 1), (2, 3, 2)]


def test_what_cannot_be_asked_is_said(lmms_model, caplog):
    with pytest.raises(ModelError, match="gives a str, where MGM takes images"):
        lmms_model.generate_until([asked(0, visual=lambda doc: ["clip.mp4"])])
    with pytest.raises(ModelError, match="acc_mutual_info"):
        lmms_model.loglikelihood([Request("", "red")])
    with pytest.raises(ModelError, match="empty"):
        lmms_model.loglikelihood([Request("Which?", "  ", picture, 0, "t", "test")])
    with pytest.raises(ConfigError, match="batch_size='auto'"):
        type(lmms_model)(str(MGM / "model"), batch_size="auto")
    with pytest.raises(ConfigError, match="max_batch_size"):
        type(lmms_model).create_from_arg_string("pretrained=x", {"max_batch_size": 8})
    lmms_model.generate_until([asked(0, visual=lambda doc: picture(doc) * 2, max_new_tokens=1, image_aspect_ratio="x")])
    assert "has 2 images; MGM sees the first one" in caplog.text and "image_aspect_ratio" in caplog.text
