"""Data-Juicer's traps, closed inside the processes that run it. Nothing outside the worker imports this.

- A missing package is installed from the network at run time: refused (and again by pip's and uv's own switches).
- Importing it switches Pillow to accept truncated files for the whole process: switched back.
- Its model operators build autograd graphs that nobody uses: turned off.
- Its processes outlive a killed parent: each dies with its own.
"""

from __future__ import annotations

import os
from functools import wraps
from typing import Any

BLOCKED = "run-time installation is blocked"

OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "PIP_NO_INDEX": "1",
    "PIP_NO_INPUT": "1",
    "UV_OFFLINE": "1",
    "WANDB_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Environment of every process that runs Data-Juicer."""

UNSET = ("DATA_JUICER_EXTERNAL_MODELS_HOME", "RAY_JOB", "MP_START_METHOD")
"""Variables of the user's that would change what Data-Juicer does."""


def apply() -> None:
    """Closes the traps in this process and in those that it forks. Call it before anything of Data-Juicer is used."""
    os.environ.update(OFFLINE)
    block_installs()
    refuse_truncated_images()
    die_with_each_parent()


def block_installs() -> None:
    """Makes Data-Juicer's installer raise ImportError."""
    from data_juicer.utils.lazy_loader import LazyLoader

    def refuse(cls: type, package_spec: str, pip_args: Any = None) -> None:
        raise ImportError(f"{BLOCKED}: {package_spec}")

    LazyLoader._install_package = classmethod(refuse)


def refuse_truncated_images() -> None:
    """Undoes what ``import data_juicer`` did to Pillow; importing it again changes nothing more."""
    import data_juicer  # noqa: F401
    from PIL import ImageFile

    ImageFile.LOAD_TRUNCATED_IMAGES = False


def without_gradients() -> None:
    """Turns autograd off in this thread; it never changes a value."""
    import torch

    torch.set_grad_enabled(False)


def let_blip2_take_prompts() -> None:
    """Repairs transformers 5.23, where BLIP-2 takes no prompt if its tokenizer names the image token."""
    from tokenizers import AddedToken
    from transformers import Blip2Processor

    call = Blip2Processor.__call__

    @wraps(call)
    def call_with_token(self: Any, *arguments: Any, **settings: Any) -> Any:
        if isinstance(self.image_token, str):
            self.image_token = AddedToken(self.image_token, normalized=False, special=True)
        return call(self, *arguments, **settings)

    Blip2Processor.__call__ = call_with_token


def die_with_each_parent() -> None:
    """Processes that this one forks end when it ends."""
    from mgm_exp.store import die_with_parent

    os.register_at_fork(after_in_child=die_with_parent)
