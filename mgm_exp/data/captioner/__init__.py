"""Captioners: BLIP-2 folders and the small shipped demo-blip2 (see docs/demo.md)."""

from mgm_exp.data.captioner.blip2 import Blip2Captioner, open_captioner
from mgm_exp.data.captioner.demo_blip2 import DEMO_CAPTIONER

__all__ = ["DEMO_CAPTIONER", "Blip2Captioner", "open_captioner"]
