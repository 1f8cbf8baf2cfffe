"""The knowledge base: every entry is well formed, found by its own excerpt, and says things that can be done."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mgm_exp.cli import VERBS
from mgm_exp.compose import compose_tree, session
from mgm_exp.doctor import GROUPS, KNOWLEDGE, Entry, case_of_log, diagnose, entries, entry, entry_of, search
from mgm_exp.doctor.entries import SEVERITIES
from mgm_exp.errors import UserError
from mgm_exp.spelling import known_keys
from mgm_exp.store import read_yaml
from tests.doctor.accuracy import EXCERPTS, HELD_OUT, NO_FAULT, PAGE, Trial, texts, trials, written
from tests.doctor.runs import FAULTY

CONF = Path(__file__).parents[2] / "conf"
# What looks like a key: before a value, or below one of the groups.
_GIVEN = r"(?<![\w.${/-])((?:[a-z_]+\.)+[a-z_]+)="
_NAMED = r"(?<![\w./-])((?:train|adapter|model|data|zero|eval|sweep|launch|tracker|paths)\.[a-z_.]+[a-z_])(?![\w.*]|=)"
_VALUE = r"(?<![\w.${/-])((?:[a-z_]+\.)*[a-z_]+)=([\w.+-]*\w)"
# Not keys of the configuration: of Hydra's launchers (tests of theirs), files, a call, a field of the manifest.
_FOREIGN = re.compile(r"^hydra\.|\.(?:json|html|safetensors)$|enable_input|model\.fingerprint")


def _is_known(key: str, keys: Iterable[str]) -> bool:
    return any(known == key or known.startswith(f"{key}.") for known in keys)


@pytest.fixture(scope="module")
def examined(tmp_path_factory: pytest.TempPathFactory) -> list[Trial]:
    return trials(tmp_path_factory.mktemp("runs"))


def test_there_are_entries_of_every_group_each_with_an_excerpt_or_a_run() -> None:
    known = {found.id for found in entries()}
    assert len(known) >= 130
    assert {found.group for found in entries()} == set(GROUPS)
    with_excerpts = {fault for _, fault, _ in texts(EXCERPTS)}
    assert with_excerpts | set(FAULTY) == known
    by_text = {found.id for found in entries() if found.text}
    assert by_text <= with_excerpts, "an entry that is found by lines of a log has one as its excerpt"
    by_signs = {found.id for found in entries() if found.signs and "machine" not in str(found.signs)}
    assert by_signs <= set(FAULTY)
    assert {fault for _, fault, _ in texts(HELD_OUT)} <= known


def test_every_excerpt_and_run_names_its_own_fault_first_and_no_other_cause(examined: list[Trial]) -> None:
    wrong = [
        (trial.kind, trial.name, trial.causes) for trial in examined if trial.fault and trial.causes != [trial.fault]
    ]
    assert wrong == []


def test_nothing_is_found_where_nothing_is_wrong(examined: list[Trial]) -> None:
    healthy = [trial for trial in examined if not trial.fault]
    assert len(healthy) > 25
    assert [(trial.name, trial.causes) for trial in healthy if not trial.found.is_well] == []
    for path in NO_FAULT.glob("*.txt"):
        assert diagnose(case_of_log(path)).is_well, path


def test_what_an_entry_leads_to_is_there_and_does_not_lead_back() -> None:
    known = {found.id: found for found in entries()}
    for found in known.values():
        assert set(found.leads_to) <= set(known), found.id
        reached, pending = set(), list(found.leads_to)
        while pending:
            following = pending.pop()
            if following not in reached:
                reached.add(following)
                pending += known[following].leads_to
        assert found.id not in reached, f"{found.id} is its own consequence"


@pytest.mark.parametrize("found", entries(), ids=lambda found: found.id)
def test_patterns_are_cheap_to_look_for(found: Entry) -> None:
    for pattern in (*found.text, *found.unless):
        assert pattern.words, f"{pattern} has no word that every match holds, so that every line would be tried"
        # Repeats of unknown length inside repeats take exponential time on a line that nearly fits.
        assert not re.search(r"\([^)]*[*+][^)]*\)[*+{]", pattern.text), pattern
        assert ".*" not in pattern.text and ".+" not in pattern.text, f"{pattern}: write .{{0,80}}"


def _said(found: Entry) -> str:
    return "\n".join((*found.fix, *found.look, found.run, found.cause))


def test_what_is_to_be_done_can_be_done() -> None:
    """Keys, values, choices and verbs that the entries name exist."""
    keys, wrong = known_keys(), []
    with session() as hydra:
        tree = compose_tree(hydra, [])
    groups = "|".join(sorted(path.relative_to(CONF).as_posix() for path in CONF.rglob("*") if path.is_dir()))
    for found in entries():
        text = _said(found)
        named = {*re.findall(_GIVEN, text), *re.findall(_NAMED, text)}
        wrong += [(found.id, key) for key in named if not _is_known(key, keys) and not _FOREIGN.search(key)]
        wrong += [(found.id, verb) for verb in re.findall(r"mgm-exp ([a-z][a-z-]+)", text) if verb not in VERBS]
        for group, choice in re.findall(rf"(?<![\w./-])({groups})=([a-z0-9_]+)", text):
            if not (CONF / group / f"{choice}.yaml").is_file() and group not in tree:
                wrong.append((found.id, f"{group}={choice}"))
        for key, value in re.findall(_VALUE, text):
            if key in keys and not (CONF / key).is_dir() and not value.isupper():  # in capitals: any value
                try:
                    OmegaConf.update(tree, key, yaml.safe_load(value))
                except OmegaConfBaseException as error:
                    wrong.append((found.id, f"{key}={value}: {error}"))
    assert wrong == []


def test_options_that_are_to_be_given_exist(capsys: pytest.CaptureFixture[str]) -> None:
    wrong, known = [], {"python -m mgm_exp": {"--cfg", "--help"}}
    for found in entries():
        for program, words in re.findall(r"(mgm-exp [a-z-]+|python -m mgm_exp)((?: [\w./=@-]+)*)", _said(found)):
            given = set(re.findall(r"--[a-z-]+", words))
            if given and program not in known:
                with pytest.raises(SystemExit):
                    VERBS[program.split()[1]].run(["--help"])
                known[program] = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
            wrong += [(found.id, program, option) for option in given - known.get(program, set())]
    assert len(known) > 5 and wrong == []


def test_an_entry_that_is_wrong_says_which_key() -> None:
    good = read_yaml(KNOWLEDGE / "disk-full.yaml")
    assert entry_of("disk-full", good).group == "disk"
    for change, words in (
        ({"colour": "red"}, "no such key: colour"),
        ({"title": ""}, "title must be a text"),
        ({"text": ["("]}, "disk-full"),
        ({"group": "weather"}, "group, severity or strength"),
        ({"strength": 100}, "group, severity or strength"),
        ({"signs": [{"curves.steps": {"nearly": 3}}]}, "no operator 'nearly'"),
        ({"source": "a book"}, "https"),
        ({"fix": []}, "a fix"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            entry_of("disk-full", {**good, **change})
    assert {found.severity for found in entries()} == set(SEVERITIES)


def test_an_unknown_id_is_answered_with_those_that_are_like_it() -> None:
    with pytest.raises(UserError, match="nccl-timeout"):
        entry("ncl-timeout")


def test_search_finds_entries_that_hold_every_word_titles_first() -> None:
    assert search("nccl timeout")[0].id == "nccl-timeout"
    assert {found.id for found in search("shm-size")} == {"shared-memory-full"}
    assert search("") == [] == search("nonsenseword")


def test_the_page_says_what_is_measured(examined: list[Trial]) -> None:
    """``python -m tests.doctor.accuracy`` writes it."""
    page = PAGE.read_text(encoding="utf-8")
    assert written(page, examined) == page
