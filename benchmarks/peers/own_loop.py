"""The same trial with a loop of one's own, on accelerate or DeepSpeed, in a process of its own.

    python -m benchmarks.peers.own_loop TRIAL.json RESULT.json

``engine`` in TRIAL.json: ``accelerate`` or ``deepspeed`` (stage 0, fp32).
The loss is at supervised positions where ``label_head`` says so, as for the Trainer.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mgm_exp.bootstrap import PARENT
from mgm_exp.store import die_with_parent


def main(trial_file: str, result_file: str) -> None:
    """Trains one trial."""
    began = time.process_time()
    import torch
    from transformers import get_cosine_schedule_with_warmup

    from benchmarks.peers.trial import Clock, padded, prepared

    trial: dict[str, Any] = json.loads(Path(trial_file).read_text(encoding="utf-8"))
    model, data = prepared(trial)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=trial["lr"], betas=(0.9, trial["beta2"]), weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, trial["warmup_steps"], len(trial["order"]))
    step = STEPS[trial["engine"]](model, trained, optimizer, schedule, trial)
    clock = Clock(trial, began, model, data)
    clock.start()
    for number, rows in enumerate(trial["order"]):
        clock.step_begins(number)
        clock.losses.append(step(padded([data[row] for row in rows], data.processor.pad_token_id)))
        clock.step_ends()
    clock.finish(Path(result_file))


Step = Callable[[dict[str, Any]], float]


def _loss(model: Any, batch: dict[str, Any], trial: dict[str, Any]) -> Any:
    base = getattr(model, "module", model)
    return base.base_model.model.loss(batch) if trial.get("label_head") else model(**batch).loss


def _accelerate(model: Any, trained: list[Any], optimizer: Any, schedule: Any, trial: dict[str, Any]) -> Step:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)

    def step(batch: dict[str, Any]) -> float:
        with accelerator.accumulate(model):
            loss = _loss(model, batch, trial)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            return float(loss)

    model.train()
    return step


def _deepspeed(model: Any, trained: list[Any], optimizer: Any, schedule: Any, trial: dict[str, Any]) -> Step:
    import deepspeed

    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ[name] = str(value)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        os.environ["MASTER_PORT"] = str(probe.getsockname()[1])
    settings = {
        "train_micro_batch_size_per_gpu": trial["batch"],
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 0},
    }
    deepspeed.init_distributed("gloo", verbose=False)
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=trained, optimizer=optimizer, lr_scheduler=schedule, config=settings
    )

    def step(batch: dict[str, Any]) -> float:
        loss = _loss(engine, batch, trial)
        engine.backward(loss)
        engine.step()
        return float(loss)

    engine.train()
    return step


STEPS = {"accelerate": _accelerate, "deepspeed": _deepspeed}


if __name__ == "__main__":
    die_with_parent(parent_pid=int(os.environ[PARENT]))
    main(*sys.argv[1:])
    sys.stdout.flush()
    # DeepSpeed and gloo leave threads behind that may crash at the interpreter's end; everything is written
    os._exit(0)
