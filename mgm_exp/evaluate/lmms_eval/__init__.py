"""MGM for lmms-eval (github.com/EvolvingLMMs-Lab/lmms-eval): ``lmms-eval --model mgm_exp --model_args pretrained=RUN``.

lmms-eval finds :func:`manifest` through the entry point group ``lmms_eval.models``; the class is imported when it
is asked for. Nothing here is needed by, or imported with, the rest of the package.
"""

from __future__ import annotations

from typing import Any

NAME = "mgm_exp"


def manifest() -> Any:
    """What lmms-eval registers: the model's name, and where its class is."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=NAME, simple_class_path=f"{__name__}.model.MgmExp", aliases=("mgm",))
