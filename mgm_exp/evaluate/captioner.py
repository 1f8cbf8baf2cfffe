"""A run of ours, or any MGM folder, as the captioner of new training data (`data.captioner.path=outputs/runs/...`).

MgmCaptioner(Path("outputs/runs/first/2026-01-01_12-00-00"), "cuda").caption(images)
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mgm_exp.data.captioner.folders import PRECISIONS
from mgm_exp.data.captioner.model_captioner import CaptionSettings, ModelCaptioner
from mgm_exp.data.conversations import CAPTION_PROMPTS
from mgm_exp.errors import MissingDependencyError, ModelError
from mgm_exp.store import read_record

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor


def is_mgm(folder: str | Path) -> bool:
    """Whether a folder is a run of ours, or a checkpoint of MGM. Reads no weights."""
    folder = Path(folder).expanduser()
    if (folder / "config.yaml").is_file() and not (folder / "config.json").is_file():
        return True
    try:
        config = read_record(folder / "config.json")
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "mm_vision_tower_aux" in config


class MgmCaptioner(ModelCaptioner):
    """An MGM that captions images and answers questions, in the prompt that it was trained with.

    Args:
        folder: A run folder (its adapter is applied), or an MGM checkpoint.
        device: "cpu", "cuda", ...
        settings: How captions are written; None: the defaults. Precision "auto" is that of the run's training on a
            GPU, and fp32 on the CPU.

    Raises:
        ModelError: the folder cannot be used, or its run has not finished.
        MissingDependencyError: precision int8, which MGM cannot be loaded in.
    """

    def __init__(self, folder: str | Path, device: str = "cpu", settings: CaptionSettings | None = None) -> None:
        from mgm_exp.model import load_model, load_processor
        from mgm_exp.model.hf.merge import hf_run

        super().__init__(settings or CaptionSettings())
        self.folder, self.device = Path(folder).expanduser(), device
        self.name = f"MGM {self.folder.resolve().name}"
        if hf_run(self.folder) is not None:
            raise ModelError(
                f"{self.folder} is a run of a model of transformers, which captions as a whole folder only.",
                advice=f"mgm-exp merge {self.folder} --out DIR, and give data.captioner.path=DIR.",
            )
        precision = self.settings.precision
        if precision == "int8":
            raise MissingDependencyError(
                f"data.captioner.precision=int8, but {self.folder} is an MGM, which is not loaded in 8 bits.",
                advice="Take auto, fp32, bf16 or fp16.",
            )
        if precision == "auto" and device == "cpu":
            precision = "fp32"
        self._model = load_model(self.folder, device=device, dtype=PRECISIONS.get(precision))
        self._processor = load_processor(self.folder)

    def fingerprint(self) -> str:
        """SHA-256 over config and tensors, adapter included."""
        from mgm_exp.model import model_fingerprint

        return model_fingerprint(self.folder)

    def _seen(self, images: tuple[Image.Image, ...], prompt: str | None) -> Any:
        return super()._seen(images, None)  # what is seen does not depend on what is asked

    def _see(self, images: tuple[Image.Image, ...], prompt: str | None) -> Tensor:
        """(B, visual tokens, hidden size)"""
        import torch

        low, high = zip(*(self._processor.pixels(image, "pad") for image in images), strict=True)
        body = self._model.model
        tower = next(body.vision_tower.parameters())
        return body.encode_images(
            torch.stack(low).to(tower.device, tower.dtype), torch.stack(high).to(tower.device, tower.dtype)
        )

    def _write(self, seen: Tensor, prompt: str | None, **generate: Any) -> list[str]:
        import torch

        ids = torch.tensor([self._processor.encode_prompt(CAPTION_PROMPTS[0] if prompt is None else prompt)])
        ids = ids.repeat(len(seen), 1).to(seen.device)  # (B, prompt)
        written = self._model.generate(
            ids,
            torch.ones_like(ids, dtype=torch.bool),
            visual_tokens=seen,
            eos_token_id=self._processor.stop_token_ids,
            **generate,
        )
        return [self._processor.decode(row) for row in written.cpu()]
