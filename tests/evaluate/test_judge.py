"""The judge, against a real server on this machine: what is sent, what is believed, what is paid for once."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from benchmark_files import MAKERS

from mgm_exp.config import JUDGE_URL, JudgeConfig
from mgm_exp.evaluate import judge as judge_module
from mgm_exp.evaluate.generate import evaluate
from mgm_exp.evaluate.judge import KEY, Judge, JudgeFailed


class Server(ThreadingHTTPServer):
    """Answers with what ``replies`` holds, the last one again and again; remembers what was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies: list[tuple[int, Any]] = [(200, "A")]
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        self.server.keys.append(self.headers.get("Authorization"))
        self.server.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        replies = self.server.replies
        code, said = replies.pop(0) if len(replies) > 1 else replies[0]
        body = {"choices": [{"message": {"role": "assistant", "content": said}}]} if isinstance(said, str) else said
        self.send_response(code)
        if code == 307:
            self.send_header("Location", f"{self.server.url}/elsewhere")
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *args: Any) -> None:
        """Nothing on the terminal of the tests."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(judge_module.time, "sleep", lambda seconds: None)
    monkeypatch.delenv(KEY, raising=False)
    with Server() as found:
        thread = threading.Thread(target=found.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield found
        found.shutdown()
        thread.join()


OPTIONS = {"A": "cat", "B": "dog"}


@pytest.mark.parametrize(
    ("reply", "letter"), [("B", "B"), (" (A).", "A"), ("Z", None), ("A or B", None), ("C", None), ("", None)]
)
def test_only_a_letter_of_the_options_is_believed(server, reply, letter):
    server.replies = [(200, reply)]
    assert Judge(server.url, "m").choice("Which?", OPTIONS, "the barking one") == letter
    asked = server.asked[0]
    assert asked["model"] == "m" and asked["temperature"] == 0
    text = asked["messages"][0]["content"]
    assert "Which?" in text and "B. dog" in text and "the barking one" in text


def test_the_key_comes_from_the_environment(server, monkeypatch):
    Judge(server.url, "m").choice("?", OPTIONS, "x")
    monkeypatch.setenv(KEY, "sesame")
    Judge(server.url, "m").choice("?", OPTIONS, "x")
    assert server.keys == [None, "Bearer sesame"]


def test_a_busy_server_is_asked_again_and_a_refusing_one_is_not(server):
    server.replies = [(503, "busy"), (429, "slow down"), (200, "B")]
    assert Judge(server.url, "m").choice("?", OPTIONS, "x") == "B" and len(server.asked) == 3
    server.replies = [(401, "no")]
    with pytest.raises(JudgeFailed, match=rf"HTTP 401.*{KEY}"):
        Judge(server.url, "m").choice("?", OPTIONS, "x")
    assert len(server.asked) == 4


@pytest.mark.parametrize("reply", [[], {"error": "x"}, {"choices": []}])
def test_what_is_no_chat_completion_is_an_error(server, reply):
    server.replies = [(200, reply)]
    with pytest.raises(JudgeFailed, match="no chat completion"):
        Judge(server.url, "m").choice("?", OPTIONS, "x")


def test_the_key_does_not_follow_a_redirect(server, monkeypatch):
    monkeypatch.setenv(KEY, "sesame")
    server.replies = [(307, "elsewhere")]
    with pytest.raises(JudgeFailed, match="HTTP 307"):
        Judge(server.url, "m").choice("?", OPTIONS, "x")
    assert len(server.asked) == 1


def test_a_server_that_is_not_there_is_named(server):
    url = server.url
    server.server_close()
    with pytest.raises(JudgeFailed, match="did not answer: "):
        Judge(url, "m", 0.2).choice("?", OPTIONS, "x")


@pytest.mark.parametrize(
    ("url", "is_allowed"),
    [
        ("https://api.example.org/v1", True),
        ("http://localhost:8000/v1", True),
        ("http://127.0.0.1/v1", True),
        ("http://example.org/v1", False),
        ("http://localhost.example.org/v1", False),
        ("https://me:key@example.org/v1", False),
        ("https://example.org/v1?key=x", False),
        ("file:///etc/passwd", False),
    ],
)
def test_the_schema_allows_https_and_this_machine(url, is_allowed):
    assert bool(JUDGE_URL.fullmatch(url)) is is_allowed


def test_unreadable_answers_are_judged_once_and_kept_through_a_stop(server, model, processor, benchmark_of, tmp_path):
    keys = MAKERS["mmbench"](tmp_path / "files")
    judge = JudgeConfig(server.url, "m")
    server.replies = [(200, "A"), (200, "A"), (401, "credit is used up")]

    def ask() -> Any:
        benchmark = benchmark_of("mmbench", **keys, judge=judge, max_new_tokens=3)
        return evaluate(model, processor, benchmark, tmp_path / "out", model_fingerprint="m")

    with pytest.raises(JudgeFailed):
        ask()
    assert len(server.asked) == 3
    server.replies = [(200, "A")]
    result = ask()
    rows = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    judged = [row for row in rows if row.get("is_judged")]
    assert len(judged) == 5, "a random model names no option"
    assert len(server.asked) == 3 + 3, "the two verdicts from before the stop are not paid for again"
    assert all(row["choice"] == "A" and row["score"] == float(row["answers"] == ["A"]) for row in judged)
    assert result.metrics["mmbench/unreadable"] == 0.0 and result.metrics["mmbench/accuracy"] == pytest.approx(2 / 5)
