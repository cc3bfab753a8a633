"""Texts over HTTP: whatever the other side does, nothing that was answered is lost."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from vestige.core.types import InputSpec
from vestige.core.writing import Sampling, Written
from vestige.errors import AccessError, QueryBudgetExceeded, RecipeError, TeacherError
from vestige.models.prompts import load_prompts
from vestige.teachers.endpoint import open_endpoint
from vestige.teachers.loading import open_teacher
from vestige.teachers.writers import MOST_CHARACTERS, BlackBoxWriter, writer_of_callable

pytest.importorskip("httpx", reason="endpoints need httpx: pip install 'vestige[text]'")

PROMPTS = load_prompts("ag-news")
SAMPLING = Sampling(new_tokens=8)


def choices(count: int, text: str = "some words", **more: Any) -> bytes:
    rows = [{"text": f"{text} {i}", "finish_reason": "stop"} for i in range(count)]
    return json.dumps({"choices": rows, **more}).encode()


class Server:
    """Answers with one act after another, then soundly. An act gets the handler and the request."""

    def __init__(self, *acts: Callable[[Any, dict], None]) -> None:
        self.acts = list(acts)
        self.requests: list[dict] = []
        self.headers: list[dict[str, str]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.requests.append(json.loads(body))
                outer.headers.append(dict(self.headers))
                act = outer.acts.pop(0) if outer.acts else sound
                try:
                    act(self, outer.requests[-1])
                except OSError:
                    # The other side gave up, as it should.
                    self.close_connection = True

            def log_message(self, *arguments: Any) -> None:
                return

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    made: list[Server] = []

    def start(*acts: Callable[[Any, dict], None]) -> Server:
        made.append(Server(*acts))
        return made[-1]

    yield start
    for one in made:
        one.http.shutdown()
        one.http.server_close()


def send(handler: Any, status: int, body: bytes, **headers: str) -> None:
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(body)))
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


def sound(handler: Any, request: dict) -> None:
    send(handler, 200, choices(request["n"], f"seed {request['seed']}"))


def says(status: int, body: bytes = b"", **headers: str) -> Callable[[Any, dict], None]:
    return lambda handler, request: send(handler, status, body, **headers)


def reset(handler: Any, request: dict) -> None:
    """Half of what was promised, then nothing."""
    handler.send_response(200)
    handler.send_header("Content-Length", "5000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [{"te')
    handler.wfile.flush()
    handler.connection.close()


def silence(handler: Any, request: dict) -> None:
    handler.connection.close()


def drip_body(handler: Any, request: dict) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    for _ in range(100):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)


def drip_head(handler: Any, request: dict) -> None:
    for byte in b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nX-Slow: " + b"a" * 200:
        handler.wfile.write(bytes([byte]))
        handler.wfile.flush()
        time.sleep(0.05)


def huge(handler: Any, request: dict) -> None:
    send(handler, 200, b'{"choices": [{"text": "' + b"a" * 200_000 + b'"}]}')


def half(handler: Any, request: dict) -> None:
    send(handler, 200, choices(1)[:-9])


def teacher(server: Server, **given: Any) -> BlackBoxWriter:
    waits: list[float] = []
    settings = {"timeout_s": 5, "backoff_s": 0.5, "most_wait_s": 40, "retries": 3, **given}
    made = open_endpoint(server.url, PROMPTS, model="m", sleep=waits.append, **settings)
    made.waits = waits  # type: ignore[attr-defined]
    return made


def ask(one: BlackBoxWriter, count: int = 3, seed: int = 0) -> list[Written]:
    return one.generate(["a prompt"], count, SAMPLING, torch.Generator().manual_seed(seed))[0]


def test_a_request_is_what_servers_understand(serve, monkeypatch):
    monkeypatch.setenv("MY_KEY", "s3cret")
    server = serve()
    one = teacher(server, key_variable="MY_KEY", extra={"user": "me"})
    texts = ask(one)
    request = server.requests[0]
    assert request["prompt"] == "a prompt" and request["n"] == 3 and request["max_tokens"] == 8
    assert request["stop"] == ['"'] and request["top_p"] == 0.9 and request["user"] == "me"
    assert server.headers[0]["Authorization"] == "Bearer s3cret"
    # The server took the quote away that made it stop.
    assert all(text.text.endswith('"') for text in texts)
    assert "s3cret" not in repr(vars(one)) + json.dumps(one.identity) + one.fingerprint()


@pytest.mark.parametrize(
    "act",
    [
        says(429),
        says(429, b"slow down"),
        says(500, b"<html>"),
        says(503),
        reset,
        silence,
        half,
        says(200, b""),
        says(200, b"\xff\xfe\x00garbage"),
        says(200, '{"choices": [{"text": "caf\xe9"}]}'.encode("latin-1")),
        says(200, b"null"),
        says(200, b"[1, 2]"),
        says(200, b"{}"),
        says(200, b'{"choices": []}'),
        says(200, b'{"choices": {"text": "x"}}'),
        says(200, b'{"choices": "text"}'),
        says(200, b'{"choices": [null, 3, "x", []]}'),
        says(200, b'{"choices": [{"text": null}, {"text": 5}, {"text": ["a"]}]}'),
        says(200, b"[" * 100_000),
        says(200, b"not gzip", Content_Encoding="gzip"),
    ],
)
def test_what_goes_wrong_once_is_asked_again(serve, act):
    server = serve(act)
    one = teacher(server)
    assert len(ask(one)) == 3
    assert len(server.requests) == 2 and len(one.waits) == 1
    # The same request again: a server that remembers need not write twice.
    assert server.requests[0] == server.requests[1]


@pytest.mark.parametrize("act", [drip_body, drip_head])
def test_a_slow_drip_is_cut_off(serve, act):
    server = serve(act)
    start = time.monotonic()
    assert len(ask(teacher(server, timeout_s=0.4))) == 3
    assert time.monotonic() - start < 3


def test_a_huge_answer_is_thrown_away_and_a_huge_text_is_cut(serve):
    server = serve(huge)
    assert len(ask(teacher(server, most_bytes=100_000))) == 3
    server = serve(huge)
    texts = ask(teacher(server), count=1)
    assert len(texts[0].text) == MOST_CHARACTERS


def test_too_few_texts_are_asked_for_again_and_too_many_are_left_out(serve):
    server = serve(says(200, choices(1)), says(200, choices(9)))
    texts = ask(teacher(server), count=4)
    assert [request["n"] for request in server.requests] == [4, 3]
    assert len(texts) == 4


def test_the_sound_ones_among_bad_choices_are_taken(serve):
    body = b'{"choices": [{"text": 5}, {"text": "good", "logprobs": {"token_logprobs": [-1, null, '
    server = serve(says(200, body + b'-3, NaN]}}, null], "usage": {"prompt_tokens": "x"}}'))
    assert ask(teacher(server), count=1) == [Written("good", -2.0)]


def test_a_server_says_how_long_to_wait(serve):
    server = serve(
        says(429, Retry_After="7"), says(503, Retry_After="1e9"), says(429, Retry_After="soon")
    )
    one = teacher(server)
    ask(one)
    assert one.waits[0] == 7 and one.waits[1] == 40 and 1 <= one.waits[2] <= 2


def test_pauses_double_with_jitter(serve):
    server = serve(*[says(500)] * 3)
    one = teacher(server)
    ask(one)
    assert (
        all(0.25 * 2**n <= wait <= 0.5 * 2**n for n, wait in enumerate(one.waits))
        and len(one.waits) == 3
    )


@pytest.mark.parametrize("status", [301, 400, 401, 404, 422])
def test_what_no_repetition_mends_is_told_at_once(serve, status, monkeypatch):
    monkeypatch.setenv("MY_KEY", "s3cret")
    server = serve(says(status, b"wrong key s3cret", Location="http://127.0.0.1:1/"))
    with pytest.raises(TeacherError, match=f"status {status}.*wrong key \\*\\*\\*"):
        ask(teacher(server, key_variable="MY_KEY"))
    assert len(server.requests) == 1


def test_it_gives_up_after_the_retries_and_says_that_nothing_is_lost(serve):
    server = serve(*[says(500)] * 9)
    with pytest.raises(TeacherError, match=r"attempt 4 of 4.*is kept"):
        ask(teacher(server))
    assert len(server.requests) == 4
    with pytest.raises(TeacherError, match="cannot be reached"):
        gone = open_endpoint("http://127.0.0.1:9", PROMPTS, retries=1, sleep=lambda s: None)
        ask(gone)


def test_what_was_answered_is_not_paid_for_again(serve, tmp_path):
    path = tmp_path / "answers"
    server = serve()
    first = teacher(server, rows=2)
    first.keep_answers(path, resume=False)
    texts, spent = ask(first, count=6), first.spent
    assert len(server.requests) == 3 and spent.tokens > 0
    server.acts = [says(400, b"nobody may ask")]
    again = teacher(server, rows=2)
    again.keep_answers(path, resume=True)
    assert ask(again, count=6) == texts and len(server.requests) == 3
    assert again.spent == spent


@pytest.mark.parametrize("damage", [lambda b: b[:-7], lambda b: b + b"00", lambda b: b + b"x\n"])
def test_a_torn_journal_keeps_what_is_whole(serve, tmp_path, damage):
    path = tmp_path / "answers"
    server = serve()
    first = teacher(server, rows=2)
    first.keep_answers(path, resume=False)
    texts = ask(first, count=6)
    path.write_bytes(damage(path.read_bytes()))
    again = teacher(server, rows=2)
    again.keep_answers(path, resume=True)
    assert ask(again, count=6) == texts
    assert len(server.requests) <= 4


def test_a_killed_run_goes_on_where_it_was_cut(serve, tmp_path):
    path = tmp_path / "answers"
    server = serve(sound, sound, *[says(400)])
    first = teacher(server, rows=2)
    first.keep_answers(path, resume=False)
    with pytest.raises(TeacherError):
        ask(first, count=6)
    again = teacher(server, rows=2)
    again.keep_answers(path, resume=True)
    whole = serve()
    assert ask(again, count=6) == ask(teacher(whole, rows=2), count=6)
    assert len(server.requests) == 4


def test_a_budget_stops_before_it_is_passed(serve):
    usage = {"prompt_tokens": 2, "completion_tokens": 20}
    server = serve(*[says(200, choices(2, usage=usage))] * 9)
    one = teacher(server, rows=2, token_budget=50)
    with pytest.raises(QueryBudgetExceeded, match=r"tokens spent from 44 to .*at most 50"):
        ask(one, count=20)
    assert one.spent.tokens == 44
    priced = teacher(server, rows=2, money_budget=1e-4, price_in=0, price_out=2)
    with pytest.raises(QueryBudgetExceeded, match="money"):
        ask(priced, count=20)
    assert priced.spent.money <= 1e-4


def test_lost_answers_count_against_the_budget(serve):
    one = teacher(serve(reset, silence))
    ask(one)
    # Half an answer was worked on, and so was one that never came.
    assert one.spent.requests == 3 and one.spent.tokens_out >= 2 * 3 * SAMPLING.new_tokens


def test_chat_is_asked_by_messages(serve):
    rows = [{"message": {"content": "said"}, "finish_reason": "stop"}, {"message": 5}]
    server = serve(says(200, json.dumps({"choices": rows}).encode()))
    assert ask(teacher(server, api="chat"), count=1) == [Written('said"')]
    assert server.requests[0]["messages"][1]["content"] == "a prompt"


@pytest.mark.parametrize(
    ("url", "given", "match"),
    [
        ("localhost:80", {}, "http:// or https://"),
        ("http://me:pass@host/v1", {}, "name or password"),
        ("http://h/v1", {"key_variable": "NOT_SET_AT_ALL"}, "NOT_SET_AT_ALL"),
        ("http://h/v1", {"api": "other"}, "'completions' or 'chat'"),
        ("http://h/v1", {"rows": 0}, "rows=0"),
        ("http://h/v1", {"money_budget": 1.0}, "prices"),
    ],
)
def test_wrong_settings_are_told_before_anything_is_sent(url, given, match):
    with pytest.raises(TeacherError, match=match) as caught:
        open_endpoint(url, PROMPTS, **given)
    assert "pass@" not in str(caught.value)


def test_it_shows_no_scores_and_cannot_be_debiased(serve):
    one = teacher(serve())
    with pytest.raises(AccessError, match="only writes texts"):
        one(torch.zeros(1, 8, dtype=torch.uint8))
    with pytest.raises(AccessError, match="debias_decay: 0"):
        one.generate(["a"], 1, Sampling(debias_decay=200.0), torch.Generator(), others=[["b"]])


def test_a_callable_writes_too():
    seen: list[list[str]] = []

    def write(prompts: list[str]) -> list[str]:
        seen.append(prompts)
        return [f"text {len(seen)} {i}" for i, _ in enumerate(prompts)]

    one = writer_of_callable(write, PROMPTS, name="mine", rows=2)
    assert [text.text for text in ask(one)] == ["text 1 0", "text 1 1", "text 2 0"]
    assert seen == [["a prompt"] * 2, ["a prompt"]]


@pytest.mark.parametrize(
    "answer", ["abc", ["a"], ["a", "b", "c", "d"], [1, 2, 3], None, {"a": 1, "b": 2, "c": 3}]
)
def test_a_callable_that_answers_something_else_is_told(answer):
    with pytest.raises(TeacherError, match="writer 'mine'"):
        ask(writer_of_callable(lambda prompts: answer, PROMPTS, name="mine"))


def test_a_callable_whose_connection_is_lost_is_called_again():
    calls = [0]

    def write(prompts: list[str]) -> list[str]:
        calls[0] += 1
        if calls[0] < 3:
            raise ConnectionResetError("gone")
        return ["x"] * len(prompts)

    one = writer_of_callable(write, PROMPTS, name="mine", sleep=lambda seconds: None)
    assert len(ask(one)) == 3 and calls == [3]


def echo() -> Callable[[list[str]], list[str]]:
    return lambda prompts: [prompt.upper() for prompt in prompts]


def test_recipes_name_endpoints_and_callables(serve, tmp_path: Path):
    server = serve()
    opened = open_teacher(
        {"endpoint": server.url, "model": "m", "prompts": "ag-news", "args": {"rows": 2}}
    )
    assert opened.task == "text" and opened.num_classes == 4
    assert opened.spec == InputSpec.text(1024) and opened.classes == PROMPTS.names
    assert len(ask(opened.module)) == 3
    made = open_teacher({"factory": f"{__name__}:echo", "prompts": "ag-news"}).module
    assert ask(made, count=1) == [Written("A PROMPT")]
    with pytest.raises(TeacherError, match=r"retrys.*expected some of"):
        open_teacher({"endpoint": server.url, "prompts": "ag-news", "args": {"retrys": 2}})
    with pytest.raises(TeacherError, match="without prompts"):
        open_teacher({"endpoint": server.url})
    with pytest.raises(RecipeError, match="expected one of ag-news"):
        open_teacher({"endpoint": server.url, "prompts": "nope"})
    with pytest.raises(TeacherError, match=r"config\.json"):
        open_teacher({"lm": str(tmp_path), "prompts": "ag-news"})
