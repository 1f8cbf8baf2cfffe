"""What surrounds a run without changing its result: places, processes, tracker, plan, monitoring."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from mgm_exp.config.choices import Card, Machines, TrackerMode


@dataclass
class TrackerConfig:
    """Weights & Biases. Files in the run folder are always written and are the source of truth."""

    mode: TrackerMode = TrackerMode.auto
    project: str = "mgm_exp"
    entity: str | None = None
    # Questions (with their images) that the predictions table holds.
    table_rows: int = 64
    # Address of a W&B server of your own. null: the client's default.
    base_url: str | None = None


@dataclass
class LaunchConfig:
    """The processes of one run (``devices``): where they are, what happens when one fails; how a sweep is sent away."""

    machines: Machines = Machines.auto
    # A file with a line "host slots=N" for each machine; the first one is this machine. null: none.
    hostfile: str | None = None
    # What runs a command on another machine of the hostfile; the host and one command line are appended.
    remote_shell: list[str] = field(default_factory=lambda: ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=15"])
    # How often a stage begins again from its newest checkpoint because a process was killed, lost or hung.
    # 0: it fails at once. More survives more faults, and repeats more often what may never work.
    max_restarts: int = 1
    # Seconds without progress of any process before those that lag behind are named and ended. It must be longer than
    # the slowest step, and than loading the model; lower notices a hang sooner.
    timeout_s: float = 1800.0
    # false: with hydra/launcher=slurm the command submits what can run now, and ends; the same command picks the sweep
    # up later.
    wait: bool = True
    # Whether this run may train in one process with others of its sweep (hydra/launcher=packed sets it). Its last bits
    # then depend on who is beside it, so that its instruct stage has a key of its own. Nothing where it cannot.
    pack: bool = False


@dataclass
class PathsConfig:
    """Where results go."""

    # runs/, sweeps/ and store/ lie below it.
    root: str = "outputs"
    store: str = MISSING
    # Copies of stage outputs for machines that share no disk: s3://BUCKET/FOLDER, gs://..., file:///FOLDER (fsspec).
    # Fetched from there rather than made, and copied there when made; credentials belong into the environment.
    mirror: str | None = None


@dataclass
class PlanConfig:
    """What ``mgm-exp plan`` and a search's predicted_memory_gib, predicted_hours assume. No stage depends on it."""

    device: Card = Card.auto
    # Rows of the instruct stage and of the align stage, where neither max_steps nor the demo says how many.
    rows: int | None = None
    align_rows: int | None = None
    # Mean tokens of a sample beside its image's, for time. null: as the curated rows in the store have them, those of
    # the demo, else 124.
    text_tokens: int | None = None
    # Most tokens of a sample beside its image's, for memory. null: the longest of the curated rows in the store, else
    # as many as max_length allows, the safe side.
    longest_text: int | None = None
    # Share of the card's peak speed that training reaches, 0..1.
    mfu: float = 0.4
    # Refuse what is predicted not to fit: a run on this machine's GPU; with a named device also cells of a sweep,
    # before they are queued. false: start it nevertheless.
    refuse: bool = True
    # Money for an hour of one device. null: as plan.prices has it.
    price: float | None = None
    # Prices of an hour by card: a file (YAML or JSON), or {h100: 2.5, a10: 0.6, currency: EUR}. null: none, no cost is
    # shown; none is shipped.
    prices: Any = None
    # GiB of main memory for all processes of a machine: a run that needs more does not fit. null: not judged.
    host_memory_gib: float | None = None


@dataclass
class MonitorLimitsConfig:
    """When a rule of monitoring holds, in Prometheus and in the run itself. Lower limits tell sooner, and more often.

    Shares are in 0..1, times in seconds.
    """

    # A gradient norm of so many times the median of the steps before it is a spike; so is such a loss.
    grad_norm_factor: float = 10.0
    loss_factor: float = 3.0
    # Share of a GPU's memory in use, for memory_s.
    memory_share: float = 0.9
    memory_s: float = 60.0
    # Training is stalled when it gives no sign for so long, and for so many times its median step.
    stalled_s: float = 300.0
    stalled_steps: float = 10.0
    # So long without an answer of the run's process, or without its sign in a text file.
    down_s: float = 60.0
    # Free space that is too little; and space that ends within so many hours, where less than a fifth is left.
    disk_free_gib: float = 10.0
    disk_hours: float = 4.0
    # Tokens a second, as a share of their median; use of a GPU while something trains.
    throughput_share: float = 0.5
    idle_share: float = 0.1
    # What "now" means for throughput, use of a GPU and losses that are no number; what it is compared with.
    recent_s: float = 300.0
    history_s: float = 3600.0


@dataclass
class MonitorConfig:
    """What a run says of its machine and of itself while it runs. No stage depends on it."""

    # Seconds between two samples of GPUs, processors, memory, disks and network (system.jsonl). null: none are taken.
    every_s: float | None = 10.0
    # Where Prometheus finds the run's numbers over HTTP: this port, or the next free one. null: nowhere.
    prometheus_port: int | None = None
    # Address that is listened on. 127.0.0.1: this machine alone; 0.0.0.0: everybody who reaches it can read them.
    prometheus_host: str = "127.0.0.1"
    # Folder for a text file with the same numbers, for node_exporter where no port may be opened. null: none.
    textfile: str | None = None
    limits: MonitorLimitsConfig = field(default_factory=MonitorLimitsConfig)


@dataclass
class AlertsConfig:
    """Messages to people while a run or a sweep goes on and when it ends; monitor.limits says when. No stage depends
    on it."""

    # Where they go, as apprise writes addresses: mail, Slack, DingTalk, Feishu, WeCom, a webhook, ... Keys are named as
    # variables of the environment ('slack://$A/$B/$C'); one that is written out is refused.
    urls: list[str] = field(default_factory=list)
    # At most one message of a kind in so many minutes, for a run or for all trials of a sweep together; so often what
    # still holds is said again. Less tells more often.
    every_minutes: float = 30.0
    # Also tell how a run ends well, and a sweep: winner, difference and how sure, path of the report.
    on_finish: bool = False
    # The sweep's message brings the report along (report.html, some hundred KiB: answers and images of your data are in
    # it) where the service takes files: mail, Slack, webhooks; not DingTalk, Feishu and WeCom.
    attach_report: bool = False
