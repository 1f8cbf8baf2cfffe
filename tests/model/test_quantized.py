"""Weights of few bits: what they are expanded to, the folder that holds them, and its proof.

bitsandbytes makes them, on a GPU; here a few lines write its format, so that reading and checking are tested anywhere.
Where bitsandbytes is installed it is compared with them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from model_files import GOLDEN, lora_run
from safetensors.torch import load_file, save_file

from mgm_exp.cli import main
from mgm_exp.errors import MissingDependencyError, ModelError
from mgm_exp.model import load_model, standalone
from mgm_exp.model.check import check_merged
from mgm_exp.model.quantized import KINDS, Packed, agrees, is_packed, kind_of, packer, roles, unpack
from mgm_exp.model.standalone import merge_run

NAME = "model.layers.0.self_attn.q_proj.weight"
# NF4's codes as its paper has them (arXiv 2305.14314, appendix E).
NF4 = [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0]
NF4 += [0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]


def reference(kind: str) -> Callable[[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The format, from its description: the nearest code of each weight."""

    def pack(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        names, w = roles(name, kind), weight.float()
        if kind == "int8":
            scale = w.abs().amax(1)
            codes = (w * 127 / scale[:, None]).round().to(torch.int8)
            return {names["codes"]: codes, names["scale"]: scale, names["format"]: torch.zeros((), dtype=torch.uint8)}
        blocks = torch.nn.functional.pad(w.flatten(), (0, -w.numel() % 64)).reshape(-1, 64)
        absmax = blocks.abs().amax(1)
        nearest = (blocks / absmax.clamp(min=1e-30)[:, None]).flatten()[: w.numel(), None] - torch.tensor(NF4)
        codes = nearest.abs().argmin(1)
        codes = torch.nn.functional.pad(codes, (0, codes.numel() % 2)).reshape(-1, 2)
        state = {"quant_type": "nf4", "blocksize": 64, "shape": list(w.shape), "dtype": "float32"}
        return {
            names["codes"]: (codes[:, 0] * 16 + codes[:, 1]).to(torch.uint8)[:, None],
            names["absmax"]: absmax,
            names["map"]: torch.tensor(NF4),
            names["state"]: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
        }

    return pack


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lora_run(tmp_path_factory.mktemp("few-bits") / "run", spread=0.05, moves_connector=False)


@pytest.fixture(scope="module", params=KINDS)
def folder(run: Path, request: pytest.FixtureRequest) -> Path:
    out = run.parent / request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(standalone, "packer", lambda kind, device: reference(kind))
        merge_run(run, out, export=request.param, license_name="mit")
    return out


@pytest.mark.parametrize("shape", [(128, 64), (33, 10), (3, 7)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_comes_back_within_half_a_code(kind: str, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.1
    tensors = reference(kind)(NAME, weight)
    packed = Packed(kind, roles(NAME, kind))
    back = unpack(packed, tensors.__getitem__)
    assert back.shape == weight.shape and kind_of(NAME, tensors) == kind
    assert agrees(back, weight, kind)
    wrong = back.clone()
    wrong.view(-1)[3] += 0.1
    assert not agrees(wrong, weight, kind)


def test_a_folder_of_few_bits_is_proven_and_loads(folder: Path) -> None:
    findings = check_merged(folder)
    assert [(f.name, f.says) for f in findings if f.holds is not True] == []
    model = load_model(folder)
    assert model.load_report.unexpected == () and model.load_report.missing == ()
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "bitsandbytes"
    whole = sum(p.numel() * 4 for n, p in model.named_parameters() if is_packed(n))
    stored = {n: t for file in folder.glob("*.safetensors") for n, t in load_file(str(file)).items()}
    few = sum(t.numel() * t.element_size() for n, t in stored.items() if is_packed(n))
    assert whole / few == (4 if folder.name == "int8" else 8)


def changed(folder: Path, tmp_path: Path, name: str, how: Callable[[torch.Tensor], torch.Tensor | None]) -> Path:
    """A copy beside the run, so that its record still leads there."""
    import shutil

    copy = folder.with_name(f"{folder.name}-{tmp_path.name}")
    shutil.copytree(folder, copy)
    file = next(file for file in copy.glob("*.safetensors") if name in load_file(str(file)))
    tensors = load_file(str(file))
    new = how(tensors.pop(name))
    save_file(tensors if new is None else {**tensors, name: new}, str(file))
    return copy


def test_damaged_codes_and_scales_are_named(folder: Path, tmp_path: Path) -> None:
    names = roles(NAME, folder.name)
    lost = names["scale" if folder.name == "int8" else "absmax"]
    copy = changed(folder, tmp_path, lost, lambda tensor: tensor * 2)
    found = {f.name: f.says for f in check_merged(copy, with_logits=False) if f.holds is False}
    assert found["weights are base + adapter"] == NAME
    copy = changed(copy, tmp_path, lost, lambda tensor: None)
    found = {f.name: f.says for f in check_merged(copy, with_logits=False) if f.holds is False}
    says = " ".join(found.values())
    assert lost in says or f"{NAME} is not" in says


def test_codes_of_the_base_are_told_from_those_of_the_merged_weight(folder: Path, tmp_path: Path) -> None:
    base = {n: t for f in (GOLDEN / "model").glob("model-*") for n, t in load_file(str(f)).items()}
    copy = folder
    for key, tensor in reference(folder.name)(NAME, base[NAME]).items():
        copy = changed(copy, tmp_path, key, lambda _, tensor=tensor: tensor)  # type: ignore[misc]
    found = {f.name: f.says for f in check_merged(copy, with_logits=False) if f.holds is False}
    assert found["LoRA is applied"] == f"not applied to 1 of 14 weights: {NAME}"


def test_a_description_of_codes_that_is_not_true_is_refused() -> None:
    tensors = reference("nf4")(NAME, torch.ones(8, 8))
    packed = Packed("nf4", roles(NAME, "nf4"))
    for state in ({"shape": [10**9, 10**9]}, {"blocksize": 10**12}, {"dtype": "int8"}, {"nested_blocksize": 256}):
        stated = json.dumps({"quant_type": "nf4", "blocksize": 64, "shape": [8, 8], "dtype": "float32"} | state)
        tensors[packed.keys["state"]] = torch.tensor(list(stated.encode()), dtype=torch.uint8)
        with pytest.raises(ModelError, match=r"belong together|describes no NF4"):
            unpack(packed, tensors.__getitem__)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_without_a_gpu_it_is_said_what_is_missing(kind: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(MissingDependencyError, match="a CUDA GPU"):
        packer(kind)
    assert main(["merge", str(run), "--out", str(run.parent / "none"), "--export", kind]) == 2
    assert "missing here: a CUDA GPU" in capsys.readouterr().err
    assert not (run.parent / "none").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_bitsandbytes_writes_what_is_read_here(kind: str) -> None:
    pytest.importorskip("bitsandbytes")
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(2)) * 0.1
    theirs, ours = packer(kind, "cpu")(NAME, weight), reference(kind)(NAME, weight)
    assert {n: (t.shape, t.dtype) for n, t in theirs.items() if "state" not in n} == {
        n: (t.shape, t.dtype) for n, t in ours.items() if "state" not in n
    }
    packed = Packed(kind, roles(NAME, kind))
    back, mine = unpack(packed, theirs.__getitem__), unpack(packed, ours.__getitem__)
    assert agrees(back, weight, kind) and (back - mine).abs().max() < 4e-3  # one step of a row
