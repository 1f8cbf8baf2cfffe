"""Captioners: BLIP-2 folders and the small shipped demo-blip2 (see docs/demo.md)."""

from mgm_exp.data.captioner.blip2 import Blip2Captioner

__all__ = ["Blip2Captioner"]
