"""Addresses name their keys; a key that is written out is refused, in words that do not repeat it."""

from __future__ import annotations

import pytest

from mgm_exp.compose import refuse_unsafe
from mgm_exp.config import address_fault, address_name, expanded_address, variables_of
from mgm_exp.errors import ConfigError
from mgm_exp.record import redact, redact_text

GOOD = [
    "$ALERT_URL",
    "slack://$SLACK_A/$SLACK_B/$SLACK_C",
    "slack://$SLACK_A/$SLACK_B/$SLACK_C/?footer=no#general",
    "dingtalk://$DING_TOKEN",
    "feishu://$FEISHU_TOKEN",
    "wecombot://$WECOM_KEY",
    "mailtos://me:$ALERT_PASSWORD@example.org?to=team@example.org",
    "json://127.0.0.1:9000/alerts",
    "jsons://hooks.example.org/training?rto=2&cto=2",
    "jsons://hooks.example.org/$ALERT_KEY",
]
BAD = [
    ("slack://T1JJ3T3L2/A1BRTD4JD/TIiajkdnlazkcOXrIdevi7FQ", "TIiajkdnlazkcOXrIdevi7FQ"),
    ("slack://$A/$B/canary1", "canary1"),
    ("dingtalk://canary", "canary"),
    ("feishu://canary2", "canary2"),
    ("wecombot://canary-key", "canary-key"),
    ("mailtos://me:canary@example.org", "canary"),
    ("jsons://user:canary@example.org/", "canary"),
    ("jsons://example.org/?api_key=canary", "canary"),
    ("jsons://example.org/?+Authorization=canary", "canary"),
    ("jsons://example.org/hooks/canary0123456789abc", "canary0123456789abc"),
    ("not an address: canary", "canary"),
]


@pytest.mark.parametrize("address", GOOD)
def test_an_address_that_names_its_keys_is_taken_and_recorded_as_it_is(address: str) -> None:
    assert address_fault(address) is None
    assert redact_text(address) == address
    assert redact({"alerts": {"urls": [address]}}) == {"alerts": {"urls": [address]}}
    refuse_unsafe([f"alerts.urls=['{address}']"])


@pytest.mark.parametrize(("address", "key"), BAD)
def test_a_key_that_is_written_out_is_refused_and_not_repeated(address: str, key: str) -> None:
    fault = address_fault(address)
    assert fault is not None and key not in fault
    assert "variable" in fault


def test_a_key_beside_variables_is_masked_wherever_it_is_written() -> None:
    assert "canary" not in redact_text("could not send to slack://$A/$B/canary1: refused")


@pytest.mark.parametrize("address", ["jsons://example.org/$WANDB_API_KEY", "mailto://me:$HF_TOKEN@example.org"])
def test_keys_of_others_go_to_no_server_that_a_configuration_names(address: str) -> None:
    fault = address_fault(address)
    assert fault is not None and "begin with ALERT" in fault


def test_a_key_is_put_in_only_where_a_message_is_sent() -> None:
    environ = {"A": "T1", "B": "x/y", "PW": "a@b/c"}
    assert variables_of("slack://$A/$B") == ("A", "B")
    assert expanded_address("slack://$A/$B", environ) == "slack://T1/x/y"
    assert expanded_address("mailtos://me:$PW@example.org", environ) == "mailtos://me:a%40b%2Fc@example.org"
    with pytest.raises(KeyError, match="MISSING"):
        expanded_address("slack://$A/$MISSING", environ)


def test_a_name_for_people_has_no_key() -> None:
    assert address_name("slack://$A/$B") == "slack://"
    assert address_name("jsons://user:$PW@example.org/hook") == "jsons://example.org"
    assert address_name("$ALERT_URL") == "$ALERT_URL"


def test_the_command_line_refuses_a_key_before_a_file_is_made() -> None:
    with pytest.raises(ConfigError) as refused:
        refuse_unsafe(["alerts.urls=['slack://T1JJ3T3L2/A1BRTD4JD/TIiajkdnlazkcOXrIdevi7FQ']"])
    assert "TIiajkdnlazkcOXrIdevi7FQ" not in str(refused.value)
    assert "$SLACK_A" in refused.value.advice
