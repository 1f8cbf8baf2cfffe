"""``mgm-exp evaluate RUN1 RUN2 ...``: one pass over the questions, and for each run what it would get alone."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mgm_exp.cli import main
from mgm_exp.compose import compose
from mgm_exp.config import plain
from mgm_exp.errors import Interrupted, ProcessKilled
from mgm_exp.evaluate import Candidate, Examiner, load_benchmark, shares_base
from mgm_exp.evaluate.answerer import MgmAnswerer
from mgm_exp.store import Lease

TINY = Path(__file__).resolve().parents[1] / "mgm_exp" / "model" / "tiny"
LORA = {"kind": "lora", "rank": 2, "alpha": 8.0, "dropout": 0.0, "target_modules": ["q_proj", "down_proj"]}
KINDS: dict[str, dict[str, Any]] = {
    "lora": LORA,
    "rslora": {**LORA, "use_rslora": True},
    "dora": {**LORA, "use_dora": True},
    "adalora": {**LORA, "kind": "adalora"},
    "loha": {**LORA, "kind": "loha"},
    "vera": {**LORA, "kind": "vera", "rank": 8},
    "bottleneck": {"kind": "bottleneck", "rank": 4, "target_modules": ["o_proj", "down_proj"]},
    "prompt": {"kind": "prompt", "tokens": 3},
    "prefix": {"kind": "prefix", "tokens": 3},
    "bitfit": {"kind": "bitfit", "norms": True},
}
# Kind, and whether the adapter has a connector of its own.
RUNS = {"a": ("dora", False), "b": ("bottleneck", False), "c": ("lora", True)}
N_QUESTIONS, N_IMAGES = 14, 5


@dataclass(frozen=True)
class Place:
    """A folder of runs that were never trained but hold adapters, and questions about five pictures."""

    root: Path

    @property
    def runs(self) -> list[str]:
        return [str(self.root / "runs" / name / "1") for name in RUNS]

    @property
    def settings(self) -> list[str]:
        files = {"questions": self.root / "mine.jsonl", "images": self.root / "images", "batch_size": 3}
        given = [f"eval.custom.{key}={value}" for key, value in files.items()]
        return [*given, "eval.custom.max_new_tokens=5", f"eval.robustness.rephrased={self.root}"]

    def evaluate(self, *arguments: str) -> int:
        return main(["evaluate", *arguments, "--benchmarks", "custom", *self.settings])

    def results(self) -> dict[str, Any]:
        """All that an evaluation leaves in the runs' folders."""
        found: dict[str, Any] = {}
        for run in map(Path, self.runs):
            for path in sorted([*run.glob("predictions/*"), *run.glob("*.json")]):
                content = path.read_text(encoding="utf-8")
                found[f"{run.parent.name}/{path.name}"] = content.replace(str(self.root), "ROOT")
        return found


def adapter_of(kind: str, folder: Path, *, has_connector: bool = False, has_tower: bool = False) -> None:
    """An adapter of the shipped base that answers otherwise, by itself or with what was trained beside it."""
    from mgm_exp.model import apply_adapter, load_model, official_name, save_adapter
    from mgm_exp.model.adapters import installed

    model = load_model(TINY, dtype="float32")
    apply_adapter(model, KINDS[kind], seed=3)
    adapter = installed(model)
    assert adapter is not None
    parts = (("mm_projector.",) if has_connector else ()) + (("vision_tower.",) if has_tower else ())
    generator = torch.Generator().manual_seed(sum(map(ord, kind)))
    model.requires_grad_(False)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            name = official_name(key)
            if name in adapter.names or name.startswith(tuple(f"model.{part}" for part in parts)):
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator)).requires_grad_(True)
    save_adapter(model, folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Place:
    from mgm_exp.data.demo import write_demo

    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("evaluations") / "outputs"
    write_demo(root, n_train=0, n_val=0, n_test=N_IMAGES, workers=1)
    images = sorted(path.name for path in (root / "images").iterdir())
    asked, again = [], []
    for k in range(N_QUESTIONS):
        words = "what does it read? " * (1 + k % 3)
        asked.append({"question_id": k, "image": images[3 * k % 5], "question": f"{k} {words}", "answer": "red"})
        again.append({"question_id": k, "question": f"in other words: {words}"})
    for name, rows in (("mine", asked), ("custom", again)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = plain(compose(["debug=fast", "device=cpu", "adapter=lora_r8", "eval.max_questions=null"]))
    for name in RUNS:
        folder = root / "runs" / name / "1"
        kind, has_connector = RUNS[name]
        adapter_of(kind, folder / "adapter", has_connector=has_connector)
        config["paths"] = {**config["paths"], "root": "gone", "store": "gone/store"}
        (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return Place(root)


@pytest.fixture
def place(made: Place, tmp_path: Path) -> Place:
    return Place(Path(shutil.copytree(made.root, tmp_path / "outputs")))


@pytest.fixture(scope="module")
def alone(made: Place, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each run gets by itself."""
    place = Place(Path(shutil.copytree(made.root, tmp_path_factory.mktemp("alone") / "outputs")))
    for run in place.runs:
        assert place.evaluate(run) == 0
    return place.results()


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """How often a base was loaded, an image read, a tower run, a batch answered."""
    from mgm_exp.model import loading
    from mgm_exp.model.clip import ClipTower
    from mgm_exp.model.processor import MGMProcessor

    calls: Counter[str] = Counter()

    def counting(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            calls[name if owner is not ClipTower else "tower"] += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapper)

    for owner, name in (
        (loading, "build_model"),
        (MGMProcessor, "pixels"),
        (ClipTower, "forward"),
        (MgmAnswerer, "answer"),
    ):
        counting(owner, name)
    return calls


def test_each_run_gets_in_one_pass_what_it_gets_alone(
    place: Place, alone: dict[str, Any], counted: Counter[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert place.evaluate(*place.runs) == 0
    assert place.results() == alone
    answers = {alone[f"{name}/custom.jsonl"] for name in RUNS}
    assert len(answers) == 3, "adapters that answer alike show nothing"
    assert counted["build_model"] == 1
    assert counted["pixels"] == N_IMAGES, "once for 14 questions, 3 adapters, and the same in other words"
    assert counted["tower"] == 1, "one group of images, whatever connectors there are"
    assert counted["answer"] == 2 * 3 * 5
    output = capsys.readouterr()
    assert "evaluate[custom]: 3 models answered side by side" in output.err
    assert [line for line in output.out.splitlines() if line in place.runs] == place.runs

    counted.clear()
    assert place.evaluate(*place.runs) == 0
    assert not counted and place.results() == alone


def test_a_stopped_pass_goes_on_where_it_was(
    place: Place,
    alone: dict[str, Any],
    counted: Counter[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real = MgmAnswerer.answer

    def stops(answerer: Any, *args: Any) -> list[str]:
        if counted["answer"] == 7:
            raise Interrupted("Stopped by SIGINT.")
        return real(answerer, *args)

    with monkeypatch.context() as patched:
        patched.setattr(MgmAnswerer, "answer", stops)
        assert place.evaluate(*place.runs) == 130
    assert f"Go on with: mgm-exp evaluate {' '.join(place.runs)} --benchmarks custom" in capsys.readouterr().err
    assert not any((Path(run) / "result.json").exists() for run in place.runs)
    assert not any(Lease(Path(run) / ".lease").holder() for run in place.runs)
    counted.clear()
    assert place.evaluate(*place.runs) == 0
    assert counted["answer"] == 2 * 3 * 5 - 7
    assert place.results() == alone


def test_nothing_is_asked_while_one_of_the_runs_is_being_written(
    place: Place, counted: Counter[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with Lease(Path(place.runs[1]) / ".lease"):
        assert place.evaluate(*place.runs) == 2
    assert f"{place.runs[1]} is being written" in capsys.readouterr().err
    assert not counted["answer"]
    assert not any(Lease(Path(run) / ".lease").holder() for run in place.runs)


def test_what_cannot_be_asked_together_is_refused_in_a_sentence(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, _ = place.runs
    assert place.evaluate(first, second, "--out", str(place.root / "out")) == 2
    assert place.evaluate(first, second, first) == 2
    assert place.evaluate(first, "--devices", "0") == 2
    assert main(["evaluate", "eval.max_questions=1"]) == 2
    error = capsys.readouterr().err
    for said in ("takes the scores of one model, and 2 are given", "named twice", "--devices 0", "needs a run folder"):
        assert said in error
    assert "Traceback" not in error


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_beside_others_answers_as_alone_and_leaves_the_base_alone(kind: str, tmp_path: Path) -> None:
    from mgm_exp.evaluate.base import Base
    from mgm_exp.evaluate.weights import load_weights
    from mgm_exp.model import model_fingerprint

    torch.set_num_threads(1)
    adapter_of(kind, tmp_path / "adapter")
    assert shares_base(tmp_path) == (kind != "bitfit")
    config = compose(["debug=fast", "device=cpu"])
    base = Base(config, "cpu")
    untouched: Any = base.answerer(None)
    before = model_fingerprint(untouched.model)

    def logits(model: Any) -> torch.Tensor:
        ids = torch.tensor([untouched.encode_prompt("what does it read?", False)])
        with torch.inference_mode():
            return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits

    plain = logits(untouched.model)
    beside: Any = base.answerer(tmp_path)
    assert torch.equal(logits(beside.model), logits(load_weights(config, tmp_path, "cpu")[0]))
    assert not torch.equal(logits(beside.model), plain)
    assert torch.equal(logits(untouched.model), plain) and model_fingerprint(untouched.model) == before


def test_a_merged_adapter_answers_as_beside_its_weights_and_leaves_the_base_alone(tmp_path: Path) -> None:
    from mgm_exp.evaluate.base import Base

    torch.set_num_threads(1)
    adapter_of("lora", tmp_path / "adapter", has_connector=True)
    assert shares_base(None, is_merged=True) and not shares_base(tmp_path, is_merged=True)
    beside, merged = (
        Base(compose(["debug=fast", "device=cpu", f"eval.merge_adapter={is_merged}"]), "cpu")
        for is_merged in ("false", "true")
    )
    answerers: list[Any] = [beside.answerer(None), beside.answerer(tmp_path), merged.answerer(tmp_path)]
    ids = torch.tensor([answerers[0].encode_prompt("what does it read?", False)])
    with torch.inference_mode():
        plain, apart, within = (
            one.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits for one in answerers
        )
    assert (apart - plain).abs().max() > 1e-2
    assert 0 < (within - apart).abs().max() < 2e-5
    assert not any("lora" in name for name, _ in answerers[2].model.named_modules())


def test_runs_evaluated_together_with_merged_adapters_are_answered_one_after_another(
    place: Place, alone: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [run for run in place.runs if "/b/" not in run]  # which cannot be merged
    assert place.evaluate(*runs, "eval.merge_adapter=true") == 0
    assert "side by side" not in capsys.readouterr().out
    for name in ("a/custom.jsonl", "c/custom.jsonl"):
        found, wanted = (
            [json.loads(line)["prediction"] for line in results[name].splitlines()]
            for results in (place.results(), alone)
        )
        assert found == wanted
    assert place.evaluate(place.runs[1], "eval.merge_adapter=true") == 2
    assert "cannot be merged" in capsys.readouterr().err


def test_which_weights_leave_their_base_to_others(tmp_path: Path) -> None:
    assert shares_base(None) and shares_base(tmp_path)
    adapter_of("lora", tmp_path / "adapter", has_connector=True)
    assert shares_base(tmp_path)
    adapter_of("lora", tmp_path / "adapter", has_tower=True)
    assert not shares_base(tmp_path), "a trained tower would be everybody's"
    adapter_of("lora", tmp_path / "adapter")
    said = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    for change in ({"init_lora_weights": "pissa"}, {"peft_type": "NEW"}, {"modules_to_save": ["x"]}):
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(said | change))
        assert not shares_base(tmp_path), change
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(said))
    assert shares_base(tmp_path)
    (tmp_path / "model").mkdir()
    assert not shares_base(tmp_path)


def examined(place: Place, devices: int) -> tuple[Any, Any, Callable[[str], dict[Candidate, Path | None]]]:
    """An examiner, a benchmark, and the candidates of a folder."""
    config = compose(["debug=fast", "device=cpu", "adapter=lora_r8", *place.settings, "eval=custom"])
    benchmark = load_benchmark("custom", config)

    def candidates(name: str) -> dict[Candidate, Path | None]:
        out = place.root / name
        weights: Sequence[Path | None] = [None, Path(place.runs[2])]
        return {Candidate(str(k), out / str(k), out / f"{k}.jsonl"): path for k, path in enumerate(weights)}

    return Examiner(config, "cpu", devices), benchmark, candidates


def test_processes_share_the_questions_and_what_one_leaves_when_it_is_killed_is_kept(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rows(name: str) -> list[bytes]:
        return [(place.root / name / str(k) / "predictions.jsonl").read_bytes() for k in range(2)]

    monkeypatch.setattr("mgm_exp.evaluate.examiner.BATCHES_A_PROCESS", 1)
    one, benchmark, candidates = examined(place, 1)
    with one:
        one.examine(benchmark, candidates("one"))
    two, _, _ = examined(place, 2)
    with two:
        two.examine(benchmark, candidates("two"))
        assert rows("two") == rows("one") and rows("one")[0] != rows("one")[1]
        few = benchmark.with_settings(max_questions=4)  # two batches: no process is given nothing
        two.examine(few, candidates("few"))
        crew = two._crew
        assert crew is not None and len(crew._members) == 2
        told: list[int] = []

        def kill_one(done: int, total: int) -> None:
            told.append(done)
            if len(told) == 3:
                for member in crew._members:
                    member._process.kill()

        with pytest.raises(ProcessKilled, match="by signal 9 before it had answered"):
            two.examine(benchmark, candidates("killed"), kill_one)
    assert not any(member._process.is_alive() for member in crew._members)
    kept = sum(len((place.root / "killed" / f"{k}.jsonl").read_text().splitlines()) - 1 for k in range(2))
    assert kept >= 2
    with one:
        told.clear()
        one.examine(benchmark, candidates("killed"), lambda done, total: told.append(done))
    assert told[0] > 0 and rows("killed") == rows("one")
