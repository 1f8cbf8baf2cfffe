"""What a step of MGM-2B costs on one GPU, switch by switch: one command, under 10 minutes.

    python benchmarks/gpu.py                # a table, and benchmarks/results_gpu.json
    python benchmarks/gpu.py --dry-run      # on the CPU with tiny shapes: whether everything runs; no number counts

The ladder (as torchtune documents its own): each rung adds one switch to those below it; tokens a second and peak
memory of an optimizer step with LoRA r=16 on a micro-batch of 4 samples of up to 2,048 tokens. Then rows with a goal,
side by side with what a user would do instead: transformers' Trainer with PEFT, the official forms, batch 1. Rungs and
rows alternate with their peers and are repeated as long as ``--minutes`` allow; medians are told.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.comparisons import Comparisons, Row, card_gib
from benchmarks.ladder import Measured, Rung, Shapes, let_go, run_rung, with_overrides

RESULTS = Path(__file__).with_name("results_gpu.json")
# Padding is part of the ladder: one sample is as long as it may be, the others as instructions are.
LADDER_LENGTHS, FULL_LENGTHS = (2048, 1536, 1024, 768), (2048,) * 4
TINY_LENGTHS, TINY_FULL = (120, 100, 90, 80), (120,) * 4


def rungs(device: str) -> list[Rung]:
    """From the plainest form up; the obstacles are those of this machine."""
    from mgm_exp.model.execution import compile_obstacle, has_liger

    liger = "" if has_liger(device) else "needs a GPU and the package liger-kernel"
    return [
        Rung(
            "fp32, eager attention, all logits, official mining, everything recomputed",
            (
                "train.precision=fp32",
                "train.tf32=false",
                "train.lora_kernel=peft",
                "train.last_block=whole",
                "model.attn_implementation=eager",
                "model.mining=reference",
                "model.gradient_checkpointing=true",
            ),
            all_logits=True,
        ),
        Rung("TF32", ("train.tf32=true",), all_logits=True),
        Rung("bf16", ("train.precision=bf16",), all_logits=True),
        Rung("FlashAttention or SDPA", ("model.attn_implementation=auto",), all_logits=True),
        Rung("head at learnt positions, in chunks", ()),
        Rung("gradient with the loss", ("train.loss_kernel=fused",)),
        Rung("Liger's loss", ("train.loss_kernel=liger",), obstacle=liger),
        Rung("LoRA in the layers' products", ("train.lora_kernel=auto",)),
        Rung("the last block where the loss reads it", ("train.last_block=auto",)),
        Rung("native mining", ("model.mining=native",)),
        Rung("no padding", ("train.padding_free=true",)),
        Rung("as few blocks recomputed as fit", ("model.gradient_checkpointing=auto",)),
        Rung("compiled blocks", ("train.compile=regional",), obstacle=compile_obstacle(device)),
        Rung("towers' features from the cache", ("train.feature_cache=towers",), sees_once=True),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """``python benchmarks/gpu.py``: 0, 1 if a goal was missed, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python benchmarks/gpu.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU: whether everything runs")
    parser.add_argument("--steps", type=int, default=6, metavar="N", help="timed steps of a rung and round (default 6)")
    parser.add_argument("--minutes", type=float, default=9.0, help="begin nothing new after this (default 9)")
    parser.add_argument("--skip", default="", metavar="A,B", help="rungs and rows whose name begins so are left out")
    parser.add_argument("--out", type=Path, help=f"where results go (default: {RESULTS.name}; dry run: nowhere)")
    options = parser.parse_args(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        print("There is no GPU here (torch sees none). --dry-run shows on the CPU whether everything runs.")
        return 2
    bench = Bench(options.dry_run, options.steps, options.minutes, tuple(filter(None, options.skip.split(","))))
    bench.climb()
    bench.compare()
    found = bench.results()
    bench.show()
    out = options.out or (None if options.dry_run else RESULTS)
    if out is not None:
        out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(f"written: {out}")
    return int(not options.dry_run and any(row.met is False for row in bench.rows))


class Bench:
    """The whole run: rounds of the ladder, then the rows."""

    def __init__(self, is_dry: bool, steps: int, minutes: float, skip: tuple[str, ...]) -> None:
        self.is_dry, self.count, self.skip = is_dry, 1 if is_dry else steps, skip
        device = "cpu" if is_dry else "cuda"
        model = "tiny" if is_dry else "mgm_2b"
        self.shapes = Shapes(model, TINY_LENGTHS if is_dry else LADDER_LENGTHS, device)
        self.full = Shapes(model, TINY_FULL if is_dry else FULL_LENGTHS, device)
        self.device = torch.device(device)
        self.began, self.limit = time.perf_counter(), 60 * minutes
        self.rungs = with_overrides(rungs(device))
        self.measured: dict[str, list[Measured]] = {}
        self.why_not: dict[str, str] = {}
        self.rows: list[Row] = []

    # -- the ladder ------------------------------------------------------------------------------------------------

    def climb(self) -> None:
        """Up, and if there is time down again, so that heat and clocks do not favour one end; the slow first two
        rungs are measured once."""
        self._round(self.rungs)
        if not self.is_dry and self._has_time(2.2):
            self._round(self.rungs[:1:-1])

    def _round(self, listed: Sequence[tuple[Rung, list[str]]]) -> None:
        last_kernel = "fused"
        for rung, overrides in listed:
            if self._is_left_out(rung.name) or rung.name in self.why_not:
                continue
            if rung.obstacle:
                self.why_not[rung.name] = rung.obstacle
                continue
            if "Liger's loss" in self.why_not:
                overrides = [o.replace("loss_kernel=liger", f"loss_kernel={last_kernel}") for o in overrides]
            if "compiled blocks" in self.why_not or self._is_left_out("compiled blocks"):
                overrides = [o.replace("compile=regional", "compile=none") for o in overrides]
            if not self._has_time(1.0):
                self.why_not.setdefault(rung.name, "no time was left")
                continue
            try:
                found = run_rung(self.shapes, overrides, rung, self.count)
            except torch.OutOfMemoryError:
                self.why_not[rung.name] = f"does not fit in {card_gib(self.device):.0f} GiB"
                let_go(self.device)
                continue
            self.measured.setdefault(rung.name, []).append(found)
            print(f"  {rung.name}: {_in_words(found)}", flush=True)

    # -- rows with a goal ------------------------------------------------------------------------------------------

    def compare(self) -> None:
        """The rows, each in its own turn."""
        rows = Comparisons(self.full, self._best(), self.count, self.is_dry)
        comparisons: list[tuple[str, Callable[[], list[Row]]]] = [
            ("head", rows.head),
            ("mining", rows.mining),
            ("cache", rows.cache),
            ("loop and memory", rows.trainer),
            ("evaluate", rows.evaluate),
            ("pack", rows.pack),
            ("graphs", rows.graphs),
        ]
        if self.is_dry:
            self.why_not["row graphs"] = "a CPU replays no CUDA graphs"
        for name, make in comparisons:
            if self._is_left_out(name) or f"row {name}" in self.why_not:
                continue
            if not self._has_time(0.7):
                self.why_not[f"row {name}"] = "no time was left"
                continue
            try:
                self.rows += make()
            except torch.OutOfMemoryError:
                self.why_not[f"row {name}"] = f"does not fit in {card_gib(self.device):.0f} GiB"
            let_go(self.device)

    # -- which of them -----------------------------------------------------------------------------------------

    def _best(self) -> list[str]:
        """The ladder's overrides that ran, but for compilation: it takes a minute a time."""
        _, overrides = self.rungs[-1]
        if "Liger's loss" in self.why_not:
            overrides = [o.replace("loss_kernel=liger", "loss_kernel=fused") for o in overrides]
        return [o for o in overrides if not o.startswith(("train.compile", "train.feature_cache"))]

    def _has_time(self, minutes: float) -> bool:
        return self.is_dry or time.perf_counter() - self.began + 60 * minutes < self.limit

    def _is_left_out(self, name: str) -> bool:
        return any(name.startswith(start) for start in self.skip)

    # -- telling ---------------------------------------------------------------------------------------------------

    def results(self) -> dict[str, Any]:
        """Everything, as it is written."""
        ladder = []
        for rung, overrides in self.rungs:
            rounds = self.measured.get(rung.name, [])
            facts: dict[str, Any] = {"name": rung.name, "adds": list(rung.overrides), "overrides": overrides}
            ladder.append({**facts, "rounds": [asdict(found) for found in rounds], "why_not": self._why(rung)})
        return {
            "schema_version": 1,
            "is_dry_run": self.is_dry,
            "machine": _machine(self.device),
            "shapes": {"model": self.shapes.model, "ladder": self.shapes.lengths, "rows": self.full.lengths},
            "steps": self.count,
            "seconds": round(time.perf_counter() - self.began, 1),
            "ladder": ladder,
            "rows": [asdict(row) for row in self.rows],
            "not_measured": {**self.why_not, **NOT_HERE},
        }

    def _why(self, rung: Rung) -> str | None:
        if rung.name in self.measured:
            return None
        return self.why_not.get(rung.name, "left out" if self._is_left_out(rung.name) else "not run")

    def show(self) -> None:
        """The table."""
        print(f"\n{'rung (each adds to those above)':76} {'tokens/s':>10} {'ms/step':>9} {'peak GiB':>9} {'x':>6}")
        before: float | None = None
        for rung, _ in self.rungs:
            rounds = self.measured.get(rung.name)
            if not rounds:
                print(f"{rung.name:76} {self._why(rung)}")
                continue
            speed = statistics.median(found.tokens_per_s for found in rounds)
            peak = max((found.peak_gib or 0.0) for found in rounds)
            gain = "" if before is None else f"{speed / before:.2f}"
            seconds = statistics.median(found.seconds for found in rounds)
            print(f"{rung.name:76} {speed:10,.0f} {1000 * seconds:9.1f} {peak or float('nan'):9.2f} {gain:>6}")
            before = speed
        print(f"\n{'row':50} {'ours':>10} {'peer':>10} {'ratio':>7} {'goal':>6}")
        for row in self.rows:
            met = {True: "met", False: "MISSED", None: ""}[row.met]
            numbers = f"{row.ours:10.2f} {row.peer:10.2f} {row.ratio:7.2f} {row.goal or 0:6.2f}"
            print(f"{row.name:50} {numbers} {met} ({row.unit}; {row.exactness}; {row.evidence})")
        for name, why in {**self.why_not, **NOT_HERE}.items():
            print(f"not measured: {name}: {why}")
        if self.is_dry:
            print("\nDry run: everything ran; no number above means anything.")


# Rows of whole sweeps: they need data, processes and more than ten minutes.
NOT_HERE = {
    "help": "`python -m benchmarks`: it uses no GPU",
    "sweep8, sweep8 + ASHA, ablation grid": "sweeps of whole runs; `python -m benchmarks` has them",
}


def _in_words(found: Measured) -> str:
    peak = "" if found.peak_gib is None else f", peak {found.peak_gib:.2f} GiB"
    return f"{found.tokens_per_s:,.0f} tokens/s, {1000 * found.seconds:.1f} ms a step{peak}, loss {found.loss:.4f}"


def _machine(device: torch.device) -> dict[str, Any]:
    from importlib.metadata import PackageNotFoundError, version

    import peft
    import transformers

    found = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
    for package in ("flash-attn", "liger-kernel", "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    if device.type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(device), "cuda": str(torch.version.cuda)}
    return found


if __name__ == "__main__":
    sys.exit(main())
