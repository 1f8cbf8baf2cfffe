"""``mgm-exp alert --test``: one message to every address of ``alerts.urls``, and who took it."""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor

from mgm_exp.errors import EXIT_DONE, EXIT_FAILED, UserError


def run(arguments: list[str]) -> int:
    """Sends the message: 0 where all took it, else 1."""
    options = _options(arguments)
    from mgm_exp.alerts import Message, check_alerts, deliver
    from mgm_exp.compose import compose
    from mgm_exp.config import address_name

    alerts = compose(options.overrides).alerts
    if not alerts.urls:
        raise UserError(
            "alerts.urls is empty: there is nobody to send a message to.",
            advice="mgm-exp alert --test \"alerts.urls=['slack://$A/$B/$C']\", with the keys in the environment.",
        )
    check_alerts(alerts)
    message = Message("Test", "info", "mgm_exp: a test", "Messages of runs and sweeps arrive here (alerts.urls).")
    is_well = True
    with ThreadPoolExecutor(len(alerts.urls)) as pool:
        found = pool.map(lambda address: deliver(address, message), alerts.urls)
        for place, (address, why) in enumerate(zip(alerts.urls, found, strict=True)):
            is_well = is_well and why is None
            print(f"alerts.urls[{place}] {address_name(address)}: {'taken' if why is None else f'not taken: {why}'}")
    return EXIT_DONE if is_well else EXIT_FAILED


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="mgm-exp alert",
        description="Sends one message to every address of alerts.urls, and says which one took it. Exit codes: 0 all "
        "did, 1 one did not, 2 bad input.",
    )
    parser.add_argument("--test", action="store_true", required=True, help="send a test message")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as of python -m mgm_exp: alerts.urls=[...]")
    return parser.parse_intermixed_args(arguments)
