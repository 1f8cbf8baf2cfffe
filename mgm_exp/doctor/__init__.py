"""What went wrong, and what to do: a knowledge base of faults, and matching of logs, curves and settings against it.

``diagnose(case_of_run(folder))`` gives the likeliest causes of a run's failure; ``compare_runs`` says where two runs
part. Nothing here imports torch or computes a step again.
"""

from mgm_exp.doctor.case import Case, case_of_log, case_of_run, case_of_text, is_run
from mgm_exp.doctor.diagnosis import Diagnosis, Evidence, Finding, diagnose
from mgm_exp.doctor.ending import explained_error
from mgm_exp.doctor.entries import GROUPS, KNOWLEDGE, Entry, entries, entry, entry_of
from mgm_exp.doctor.keywords import search
from mgm_exp.doctor.parting import Comparison, Parting, compare_runs
from mgm_exp.doctor.sweep import SweepDiagnosis, diagnose_sweep, is_sweep
from mgm_exp.doctor.wording import entry_in_words, in_words, list_in_words

__all__ = [
    "GROUPS",
    "KNOWLEDGE",
    "Case",
    "Comparison",
    "Diagnosis",
    "Entry",
    "Evidence",
    "Finding",
    "Parting",
    "SweepDiagnosis",
    "case_of_log",
    "case_of_run",
    "case_of_text",
    "compare_runs",
    "diagnose",
    "diagnose_sweep",
    "entries",
    "entry",
    "entry_in_words",
    "entry_of",
    "explained_error",
    "in_words",
    "is_run",
    "is_sweep",
    "list_in_words",
    "search",
]
