"""``mgm-exp monitor RUN``: what a run took of its machine; ``--write DIR``: files for Prometheus and Grafana."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from mgm_exp.errors import EXIT_DONE, DataError, UserError
from mgm_exp.verbs.validate import printable

_ADDRESS = re.compile(r"[A-Za-z0-9.-]+:\d{1,5}|\[[0-9a-fA-F:]+\]:\d{1,5}")


def run(arguments: list[str]) -> int:
    """Shows a run's samples, or writes the files."""
    options = _options(arguments)
    if options.write is not None:
        _write(options)
        return EXIT_DONE
    if len(options.what) != 1:
        raise UserError(
            f"mgm-exp monitor takes one run's folder; {len(options.what)} were given.",
            advice="Or --write DIR [OVERRIDES], which writes the files for Prometheus.",
        )
    _show(Path(options.what[0]))
    return EXIT_DONE


def _write(options: argparse.Namespace) -> None:
    from mgm_exp.compose import compose
    from mgm_exp.monitor.setup_files import Setup

    for option, address in (
        *(("--target", target) for target in options.target),
        ("--node-exporter", options.node_exporter),
        ("--alertmanager", options.alertmanager),
    ):
        if address is not None and not _ADDRESS.fullmatch(address):
            raise UserError(f"{option} {address} is no address.", advice="Give HOST:PORT.")
    if not 1 <= options.interval <= 3600:
        raise UserError(f"--interval {options.interval} must lie in 1..3600 seconds.")
    if not options.webhook.startswith(("http://", "https://")):
        raise UserError(f"--webhook {options.webhook} is no address.", advice="Give http://HOST:PORT/ or https://...")
    config = compose(options.what)
    setup = Setup(
        Path(config.paths.root),
        config.monitor.limits,
        options.interval,
        static=tuple(options.target),
        node_exporter=options.node_exporter,
        alertmanager=options.alertmanager,
        webhook=options.webhook,
    )
    for path in setup.write(options.write):
        print(f"written: {path}")
    folder = options.write
    print(f"check:  (cd {folder} && promtool check config prometheus.yml && promtool test rules rules_test.yml)")
    print(f"start:  prometheus --config.file={folder}/prometheus.yml --web.listen-address=127.0.0.1:9090")
    print(f"        prometheus-alertmanager --config.file={folder}/alertmanager.yml --cluster.listen-address=")
    print("runs:   python -m mgm_exp ... monitor.prometheus_port=9301")


def _show(folder: Path) -> None:
    from mgm_exp.config import MonitorLimitsConfig
    from mgm_exp.monitor import Summary, read_samples

    path = folder / "system.jsonl"
    if not path.is_file():
        raise UserError(
            f"{folder} has no system.jsonl.",
            advice="Give a run's folder (outputs/runs/NAME/TIME) that was made with monitor.every_s.",
        )
    samples = read_samples(path)
    if not samples:
        raise UserError(f"{path} holds no sample yet.")
    try:
        minutes = (samples[-1]["t"] - samples[0]["t"]) / 60
        lines = _lines(Summary(MonitorLimitsConfig(), samples).as_json(), samples[-1])
        place = _place(samples[-1])
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise DataError(f"{path} is not what a run writes ({type(error).__name__}: {error}).") from error
    print(f"{len(samples)} samples in {minutes:.1f} minutes, the last one in {place}")
    for line in lines:
        print(f"  {printable(line)}")


def _place(sample: dict[str, Any]) -> str:
    stage = printable(str(sample["stage"]))[:40] if sample.get("stage") else None
    return f"{stage} step {int(sample['step'])}" if stage else "no training stage"


def _lines(found: dict[str, Any], last: dict[str, Any]) -> list[str]:
    """What was read, in words; nothing of what the machine does not tell."""
    lines = []
    if "cpu_mean" in found:
        lines.append(f"processors   {found['cpu_mean']:.0%} of the machine busy on average")
    if "process_memory_gib_peak" in found:
        lines.append(f"memory       {found['process_memory_gib_peak']:.2f} GiB at most in the run's processes")
    if "memory_gib_peak" in found:
        lines.append(
            f"             {found['memory_gib_peak']:.1f} of {last['memory_total_gib']:.1f} GiB of the machine at most"
        )
    for name, free in found.get("disk_free_gib_least", {}).items():
        lines.append(f"disk         {free:.1f} GiB free at least ({name})")
    if "gpu_memory_gib_peak" in found:
        totals = [gpu["memory_total_gib"] for gpu in last.get("gpus") or () if gpu["memory_total_gib"] is not None]
        of = f" of {max(totals):.1f}" if totals else ""
        lines.append(f"GPU memory   {found['gpu_memory_gib_peak']:.1f}{of} GiB on one GPU at most")
    if "gpu_utilization_mean" in found:
        lines.append(
            f"GPU use      {found['gpu_utilization_mean']:.0%} while a stage trained, idle for "
            f"{found['gpu_idle_share']:.0%} of that time"
        )
    return lines


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="mgm-exp monitor",
        description="What a run took of its machine (system.jsonl). With --write: files for Prometheus, Alertmanager "
        "and Grafana, with the alert rules and a test of each; overrides say which runs (paths.root=...) and when "
        "alerts are raised (monitor.limits....).",
    )
    parser.add_argument("what", nargs="*", metavar="RUN|OVERRIDE", help="a run's folder; with --write: overrides")
    parser.add_argument(
        "--write", type=Path, metavar="DIR", help="write prometheus.yml, rules.yml, rules_test.yml, ..."
    )
    parser.add_argument("--interval", type=int, default=15, metavar="S", help="seconds between two scrapes (15)")
    parser.add_argument(
        "--target",
        action="append",
        default=[],
        metavar="HOST:PORT",
        help="a run elsewhere, whose paths.root cannot be read here; may be repeated",
    )
    parser.add_argument("--node-exporter", metavar="HOST:PORT", help="the one that reads monitor.textfile")
    parser.add_argument("--alertmanager", default="127.0.0.1:9093", metavar="HOST:PORT", help="(127.0.0.1:9093)")
    parser.add_argument(
        "--webhook", default="http://127.0.0.1:9304/", metavar="URL", help="where alerts go (http://127.0.0.1:9304/)"
    )
    return parser.parse_intermixed_args(arguments)
