"""Places and edits that the tests of the model room share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).parent.parent / "data" / "mgm"
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def lora_run(folder: Path, *, spread: float = 0.02, moves_connector: bool = True) -> Path:
    """A run folder with a LoRA of rank 8 on the golden model that does something, and a connector of its own."""
    import torch

    from mgm_exp.model import apply_adapter, load_model, save_adapter

    model = load_model(GOLDEN / "model")
    lora = {"kind": "lora", "rank": 8, "alpha": 16, "dropout": 0.0, "target_modules": list(SEVEN)}
    apply_adapter(model, lora, seed=3)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
            elif moves_connector and ("mm_projector" in name or "vlm_uni" in name):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.01)
    save_adapter(model, folder / "adapter")
    (folder / "config.yaml").write_text(f"model:\n  name: golden\n  path: {GOLDEN / 'model'}\n")
    return folder


def edit_json(path: Path, **changes: Any) -> None:
    """Changes fields of a JSON object; None removes one."""
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
