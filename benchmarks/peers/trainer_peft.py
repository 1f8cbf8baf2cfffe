"""What a user would do instead: one LoRA trial with transformers' Trainer and PEFT, in a process of its own.

    python -m benchmarks.peers.trainer_peft TRIAL.json RESULT.json

The Trainer's own optimizer, schedule and loop; what is trained on is that of :mod:`benchmarks.peers.trial`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from mgm_exp.bootstrap import PARENT
from mgm_exp.store import die_with_parent


def main(trial_file: str, result_file: str) -> None:
    """Trains one trial; with ``rungs`` it asks at each of them, over its pipes, whether it should go on."""
    began = time.process_time()
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from benchmarks.peers.trial import Clock, padded, prepared

    trial: dict[str, Any] = json.loads(Path(trial_file).read_text(encoding="utf-8"))
    model, data = prepared(trial)
    clock = Clock(trial, began, model, data)

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.start()

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            clock.step_begins(state.global_step)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.step_ends()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in (logs or {}):
                clock.losses.append(float(logs["loss"]))
                control.should_training_stop |= clock.is_stopped(state.global_step)

    class Ordered(Trainer):  # type: ignore[misc]
        """Reads the rows in the order that was given; for comparing loops, computes the loss as ours does."""

        def _get_train_sampler(self, *_: Any) -> Any:
            return [row for step in trial["order"] for row in step]

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if trial.get("label_head"):
                return model.base_model.model.loss(inputs)
            return super().compute_loss(model, inputs, *args, **kwargs)

    arguments = TrainingArguments(
        output_dir=trial["out"],
        per_device_train_batch_size=trial["batch"],
        max_steps=len(trial["order"]),
        learning_rate=trial["lr"],
        lr_scheduler_type="cosine",
        warmup_steps=trial["warmup_steps"],
        adam_beta2=trial["beta2"],
        weight_decay=0.0,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    Ordered(
        model=model,
        args=arguments,
        train_dataset=data,
        data_collator=lambda rows: padded(rows, data.processor.pad_token_id),
        callbacks=[Watch()],
    ).train()
    clock.finish(Path(result_file))


if __name__ == "__main__":
    die_with_parent(parent_pid=int(os.environ[PARENT]))
    main(*sys.argv[1:])
