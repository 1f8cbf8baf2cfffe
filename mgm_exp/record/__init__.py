"""Recording a run: the files in its folder first, then every sink that shows them to people.

``open_recorder`` gives the recorder of a run; ``write_manifest`` and ``write_result`` write the two files that other
programs read. Nothing here imports torch or wandb before it is used.
"""

from mgm_exp.record.config_tree import config_tree
from mgm_exp.record.environment import SOURCE, collect_environment, git_state
from mgm_exp.record.failure import explain
from mgm_exp.record.files import FilesSink, json_line
from mgm_exp.record.log import log_to
from mgm_exp.record.manifest import SCHEMA_VERSION, empty_result, write_manifest, write_result
from mgm_exp.record.progress import ProgressSink
from mgm_exp.record.recorder import Recorder, RunInfo, Sink, open_recorder
from mgm_exp.record.secrets import is_secret_name, redact, redact_text
from mgm_exp.record.wandb_sink import WandbSink

__all__ = [
    "SCHEMA_VERSION",
    "SOURCE",
    "FilesSink",
    "ProgressSink",
    "Recorder",
    "RunInfo",
    "Sink",
    "WandbSink",
    "collect_environment",
    "config_tree",
    "empty_result",
    "explain",
    "git_state",
    "is_secret_name",
    "json_line",
    "log_to",
    "open_recorder",
    "redact",
    "redact_text",
    "write_manifest",
    "write_result",
]
