"""Modules that are loaded when they are used: nothing is missing, nothing runs twice, and a run leaves them alone."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mgm_exp import deferred

REPOSITORY = Path(__file__).resolve().parents[1]
LATE, INNER, OTHER, HOLDER = "late_pkg", "late_pkg.inner", "late_pkg.other", "late_holder"


@pytest.fixture
def executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What of a small package was executed; it and a module within it are deferred."""
    seen: list[str] = []
    monkeypatch.setattr(deferred, "seen_by_a_test", seen, raising=False)
    note = "from mgm_exp import deferred\ndeferred.seen_by_a_test.append(__name__)\n"
    package = tmp_path / LATE
    package.mkdir()
    (package / "__init__.py").write_text(
        f"{note}if getattr(deferred, 'fails_in_a_test', False): raise RuntimeError('broken')\n"
        "from . import other\nfrom .inner import Deep\nnumber = 3\ndef useful(x): return x * number\n"
        "def depth(): return Deep().depth\n"
    )
    (package / "inner.py").write_text(f"{note}import late_pkg\nclass Deep: depth = 4 + late_pkg.number\n")
    (package / "other.py").write_text(f"{note}value = 5\n")
    (tmp_path / f"{HOLDER}.py").write_text("from late_pkg import useful\nfrom late_pkg.inner import Deep\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(deferred.DEFERRED, LATE, {"useful": deferred._calls(LATE, "useful")})
    monkeypatch.setitem(deferred.DEFERRED, INNER, {"Deep": deferred._calls(INNER, "Deep")})
    before = list(sys.meta_path)
    deferred.install()
    yield seen
    sys.meta_path[:] = before
    for name in (LATE, INNER, OTHER, HOLDER):
        sys.modules.pop(name, None)


def load(name: str) -> Any:
    return importlib.import_module(name)


def test_importing_a_name_executes_nothing(executed: list[str]) -> None:
    load(HOLDER)
    assert executed == []
    assert deferred.is_deferred(LATE) and deferred.is_deferred(INNER)
    assert not deferred.is_loaded(LATE)
    assert "late_pkg" in repr(sys.modules[LATE]) and sys.modules[LATE].__file__
    assert executed == []


def test_a_call_loads_it_and_whoever_holds_the_name_gets_the_real_one(executed: list[str]) -> None:
    holder = load(HOLDER)
    early = holder.useful
    assert early(2) == 6
    late = sys.modules[LATE]
    assert executed == [LATE, OTHER]  # what it imports itself stays deferred, where that is
    assert type(late) is ModuleType and deferred.is_loaded(LATE) and deferred.is_deferred(INNER)
    assert holder.useful is late.useful
    assert early(3) == 9
    assert late.__spec__.loader is late.__loader__ and type(late.__loader__).__name__ == "SourceFileLoader"
    assert late.depth() == 7
    assert executed == [LATE, OTHER, INNER]
    assert holder.Deep is late.Deep is sys.modules[INNER].Deep and isinstance(holder.Deep, type)


def test_the_inner_one_is_the_parents_from_the_start(executed: list[str]) -> None:
    late = load(LATE)
    inner = late.inner
    assert inner is sys.modules[INNER] is load(INNER)
    assert executed == []
    assert inner.Deep().depth == 7
    assert executed == [LATE, OTHER, INNER]  # the package comes first, as always


@pytest.mark.parametrize("use", ["number", "other", "__all__", "missing"])
def test_any_other_name_loads_it(executed: list[str], use: str) -> None:
    late = load(LATE)
    if use in ("number", "other"):
        getattr(late, use)
    else:
        with pytest.raises(AttributeError, match=use):
            getattr(late, use)
    assert executed == [LATE, OTHER]


def test_what_lies_within_loads_the_package_first_and_runs_once(executed: list[str]) -> None:
    load(LATE)
    other = load(OTHER)
    assert executed == [LATE, OTHER]
    assert other is sys.modules[LATE].other
    assert other.__spec__.loader.get_source(OTHER)
    with pytest.raises(ModuleNotFoundError):
        load(f"{LATE}.nowhere")


def test_listing_setting_and_deleting_see_the_whole_module(executed: list[str]) -> None:
    late = load(LATE)
    assert {"number", "useful", "other", "inner"} <= set(dir(late))
    sys.modules.pop(LATE)
    late = load(LATE)
    late.number = 10
    assert late.useful(2) == 20
    sys.modules.pop(LATE)
    late = load(LATE)
    del late.number
    with pytest.raises(NameError):
        late.useful(1)


def test_a_failure_is_raised_each_time_until_it_is_gone(executed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    holder = load(HOLDER)
    monkeypatch.setattr(deferred, "fails_in_a_test", True, raising=False)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="broken"):
            holder.useful(1)
        assert deferred.is_deferred(LATE)
    monkeypatch.setattr(deferred, "fails_in_a_test", False)
    assert holder.useful(1) == 3


def test_of_many_threads_one_loads_it_and_all_find_it_whole(executed: list[str]) -> None:
    late, found = load(LATE), []
    start = threading.Barrier(8)

    def ask() -> None:
        start.wait()
        found.append(late.useful(late.number))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [9] * 8
    assert executed == [LATE, OTHER]


def test_installing_twice_installs_once() -> None:
    before = list(sys.meta_path)
    try:
        deferred.install()
        once = list(sys.meta_path)
        deferred.install()
        assert sys.meta_path == once
    finally:
        sys.meta_path[:] = before


def test_the_last_names_of_a_file_are_those_of_its_tail() -> None:
    taken: list[str] = []
    take = deferred._from_the_last(lambda content: taken.append(content) or [])  # type: ignore[func-returns-value]
    twice = 'x\r\n__all__ = ["a"]\n__all__ = ["b"]\ny'
    for content in ("", "a\nb", '__all__ = ["a"]\n', twice, "# __all__\n x__all__"):
        take(content)
    assert taken == ["", "a\nb", '__all__ = ["a"]\n', '__all__ = ["b"]\ny', "# __all__\n x__all__"]


def in_a_process(program: str) -> Any:
    """What a program prints last, as JSON."""
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


# After what every run imports; then what the compiler and its marks do, before and after it is there.
REAL = """
import json
from mgm_exp import deferred
deferred.install()
import torch
from mgm_exp.warm.imports import load
load()
import transformers, sys
found = {"deferred": [name for name in deferred.DEFERRED if deferred.is_deferred(name)]}
found["with them"] = [name for name in ("sympy", "torch._inductor", "scipy.special") if name in sys.modules]
from transformers.utils import import_utils
from pathlib import Path
models = Path(transformers.__file__).parent / "models"
cell = lambda function: function.__closure__[0].cell_contents
look, names_in = import_utils.create_import_structure_from_path, import_utils.fetch__all__
kept = look(models)
import_utils.create_import_structure_from_path, import_utils.fetch__all__ = cell(look), cell(names_in)
cell(look).cache_clear()
found["same models"] = cell(look)(str(models / "__init__.py")) == kept and len(kept) > 100

def train():
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()
    return layer.weight.detach()

seen = []

@torch.compiler.disable
def apart(x):
    '''Not to be compiled.'''
    seen.append(torch.compiler.is_compiling())
    return x + 1

def whole(x):
    return apart(x * 2) * 3

before = train()
meta = torch.randn(3, 4, device="meta")
found["still deferred"] = deferred.is_deferred("torch._dynamo") and meta.stride() == (4, 1) and seen == []
found["eager"] = whole(torch.ones(1)).item()
found["name"] = apart.__name__ + apart.__doc__
import torch._dynamo.utils
found["compiled"] = torch.compile(whole, backend="eager")(torch.ones(1)).item()
found["loaded"] = deferred.is_loaded("torch._dynamo") and "sympy" in sys.modules
found["was compiled"] = seen
found["breaks"] = sum(torch._dynamo.utils.counters["graph_break"].values())
found["same steps"] = bool((train() == before).all())
from transformers.loss import loss_for_object_detection as detection
found["assigned"] = [part.tolist() for part in detection.linear_sum_assignment([[4, 1], [2, 3]])]
import scipy.optimize
found["real"] = detection.linear_sum_assignment is scipy.optimize.linear_sum_assignment
from transformers import masking_utils
import torch._dynamo._trace_wrapped_higher_order_op as wrapped
found["index"] = masking_utils.TransformGetItemToIndex is wrapped.TransformGetItemToIndex
print(json.dumps(found))
"""


def test_torch_and_transformers_do_what_they_did() -> None:
    assert in_a_process(REAL) == {
        "deferred": sorted(deferred.DEFERRED, key=list(deferred.DEFERRED).index),
        "with them": [],
        "same models": True,
        "still deferred": True,
        "eager": 9.0,
        "name": "apartNot to be compiled.",
        "compiled": 9.0,
        "loaded": True,
        "was compiled": [False, False],
        "breaks": 1,
        "same steps": True,
        "assigned": [[0, 1], [1, 0]],
        "real": True,
        "index": True,
    }


RUN = """
import json, sys
from mgm_exp.command import main
assert main(sys.argv[1:]) == 0
from mgm_exp import deferred
print(json.dumps([name for name in deferred.DEFERRED if deferred.is_loaded(name)]))
"""


def test_a_run_with_lora_uses_none_of_them(tmp_path: Path) -> None:
    arguments = ["debug=fast", "device=cpu", "adapter=lora_r8", f"paths.root={tmp_path}"]
    program = RUN.replace("sys.argv[1:]", repr(arguments))
    assert in_a_process(program) == []
