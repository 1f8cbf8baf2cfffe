"""Captioners: BLIP-2 folders, other image-text-to-text models, and the small shipped demo-blip2 (see docs/demo.md)."""

from mgm_exp.data.captioner.accuracy import captioner_accuracy
from mgm_exp.data.captioner.blip2 import Blip2Captioner
from mgm_exp.data.captioner.demo_blip2 import DEMO_CAPTIONER
from mgm_exp.data.captioner.image_text import ImageTextCaptioner
from mgm_exp.data.captioner.model_captioner import CaptionSettings, ModelCaptioner
from mgm_exp.data.captioner.opening import open_captioner

__all__ = [
    "DEMO_CAPTIONER",
    "Blip2Captioner",
    "CaptionSettings",
    "ImageTextCaptioner",
    "ModelCaptioner",
    "captioner_accuracy",
    "open_captioner",
]
