"""An OpenAI-compatible server as a teacher that writes texts."""

import email.utils
import json
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any, Literal
from urllib.parse import urlsplit

from vestige.core.writing import QUOTE, Sampling, Written
from vestige.errors import MissingExtraError, TeacherError
from vestige.models.prompts import Prompts
from vestige.teachers.text_journal import Spent
from vestige.teachers.writers import BlackBoxWriter, NoAnswer, tokens_of

# Where a later attempt may succeed.
_PASSING = frozenset({408, 409, 425, 429, *range(500, 600)})
_EXCERPT = 200
_Answer = tuple[int, Mapping[str, str], bytes]
_CHAT = "Continue the text exactly where it ends, and end with a double quote. Write nothing else."


class _Client:
    """Sends requests of completions or chat and reads answers that may be anything.

    See `open_endpoint` for the arguments.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        api: Literal["completions", "chat"],
        key: str | None,
        timeout_s: float,
        most_bytes: int,
        extra: Mapping[str, Any],
        environment_proxy: bool,
    ) -> None:
        import httpx

        path = "chat/completions" if api == "chat" else "completions"
        base = url.rstrip("/")
        self._url = base if base.endswith(path) else f"{base}/{path}"
        self._model, self._chat, self._key = model, api == "chat", key
        self._timeout, self._most, self._extra = timeout_s, most_bytes, dict(extra)
        headers = {"Accept": "application/json"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        # Made now: certificates are files, and none may be opened while a method runs. A redirect
        # is not followed, because the key would go along. Connections are not kept: one that a
        # server closed meanwhile would fail on the next request.
        self._http = httpx.Client(
            headers=headers,
            timeout=timeout_s,
            follow_redirects=False,
            trust_env=environment_proxy,
            limits=httpx.Limits(max_keepalive_connections=0),
        )

    def ask(
        self, prompt: str, count: int, sampling: Sampling, seed: int
    ) -> tuple[list[Written], Spent]:
        """Some of `count` texts, at least one, and what they cost.

        Raises:
            NoAnswer: no text came, and another attempt may bring one.
            TeacherError: no attempt will.
        """
        asked = tokens_of(prompt)
        # What was worked on and got lost may be charged; take it that all of it is.
        lost = Spent(1, asked, count * sampling.new_tokens)
        status, headers, body = self._in_time(self._request(prompt, count, sampling, seed), lost)
        if status in _PASSING:
            raise NoAnswer(
                f"{self._url} answered with status {status} ({self._shown(body)})",
                wait_s=_retry_after(headers.get("retry-after")),
            )
        if status != 200:
            raise TeacherError(
                f"{self._url} answered with status {status} ({self._shown(body)}), expected 200; "
                "check the address, the model's name and the key"
            )
        try:
            answer = json.loads(body.decode("utf8"))
        except (ValueError, RecursionError) as error:
            raise NoAnswer(
                f"{self._url} answered with what is no JSON in UTF-8 ({self._shown(body)})",
                cost=lost,
            ) from error
        choices = answer.get("choices") if isinstance(answer, dict) else None
        texts = [
            text
            for choice in (choices if isinstance(choices, list) else [])
            if (text := self._text(choice)) is not None
        ]
        cost = _usage(answer, asked, texts)
        if not texts:
            raise NoAnswer(
                f"{self._url} answered without a text in 'choices' ({self._shown(body)})",
                cost=cost,
            )
        return texts, cost

    def _request(self, prompt: str, count: int, sampling: Sampling, seed: int) -> dict[str, Any]:
        request: dict[str, Any] = {
            "model": self._model,
            "n": count,
            "max_tokens": sampling.new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "stop": [QUOTE],
            "seed": seed,
        }
        if sampling.top_k:
            request["top_k"] = sampling.top_k
        if self._chat:
            request["messages"] = [
                {"role": "system", "content": _CHAT},
                {"role": "user", "content": prompt},
            ]
        else:
            request["prompt"] = prompt
        return {**request, **self._extra}

    def _in_time(self, request: Mapping[str, Any], lost: Spent) -> _Answer:
        """`_sent`, given up where even the head of the answer comes byte by byte."""
        outcome: queue.SimpleQueue[_Answer | BaseException] = queue.SimpleQueue()

        def send() -> None:
            try:
                outcome.put(self._sent(request, lost))
            except BaseException as error:
                outcome.put(error)

        threading.Thread(target=send, daemon=True).start()
        try:
            # Half a second for what notices the end of the time itself.
            found = outcome.get(timeout=self._timeout + 0.5)
        except queue.Empty as error:
            raise NoAnswer(
                f"{self._url} did not end its answer in {self._timeout:g} s", cost=lost
            ) from error
        if isinstance(found, BaseException):
            raise found
        return found

    def _sent(self, request: Mapping[str, Any], lost: Spent) -> _Answer:
        """Status, headers and body of the answer; the whole of it within the time limit."""
        import httpx

        end = time.monotonic() + self._timeout
        body = bytearray()
        try:
            with self._http.stream("POST", self._url, json=dict(request)) as answer:
                # By chunks: each of them may be in time, and all of them together never end.
                for chunk in answer.iter_bytes():
                    body += chunk
                    if len(body) > self._most:
                        raise NoAnswer(
                            f"{self._url} answered with more than {self._most:,} bytes", cost=lost
                        )
                    if time.monotonic() > end:
                        raise NoAnswer(
                            f"{self._url} did not end its answer in {self._timeout:g} s", cost=lost
                        )
                return answer.status_code, answer.headers, bytes(body)
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
            raise NoAnswer(f"{self._url} cannot be reached ({error})") from error
        except (httpx.HTTPError, httpx.StreamError) as error:
            told = str(error) or type(error).__name__
            raise NoAnswer(f"{self._url} broke off ({told})", cost=lost) from error
        except (httpx.InvalidURL, UnicodeError) as error:
            raise TeacherError(
                f"got the address {self._url}, which cannot be asked ({error}), expected http:// "
                "or https:// and a host; correct it"
            ) from error

    def _text(self, choice: Any) -> Written | None:
        """The text of a choice, with the closing quote that made the server stop."""
        if not isinstance(choice, dict):
            return None
        text = choice.get("text")
        if self._chat:
            message = choice.get("message")
            text = message.get("content") if isinstance(message, dict) else None
        if not isinstance(text, str):
            return None
        if choice.get("finish_reason") == "stop" and QUOTE not in text:
            text += QUOTE
        return Written(text, _mean(choice.get("logprobs")))

    def _shown(self, body: bytes) -> str:
        """The beginning of an answer, without the key, which some servers repeat."""
        text = body[: 4 * _EXCERPT].decode("utf8", errors="replace")
        if self._key:
            text = text.replace(self._key, "***")
        return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:_EXCERPT]


def open_endpoint(
    url: str,
    prompts: Prompts,
    *,
    model: str = "",
    api: Literal["completions", "chat"] = "completions",
    key_variable: str = "",
    timeout_s: float = 60.0,
    most_bytes: int = 8 * 2**20,
    extra: Mapping[str, Any] | None = None,
    environment_proxy: bool = False,
    rows: int = 32,
    retries: int = 6,
    backoff_s: float = 1.0,
    most_wait_s: float = 60.0,
    token_budget: int | None = None,
    money_budget: float | None = None,
    price_in: float = 0.0,
    price_out: float = 0.0,
    sleep: Callable[[float], None] | None = None,
) -> BlackBoxWriter:
    """A teacher behind an address; nothing is sent yet.

    Args:
        url: such as http://127.0.0.1:8000/v1; "completions" or "chat/completions" is added.
        prompts: of the task.
        model: name that the server knows.
        api: "completions" continues a prompt; "chat" asks a chat model to, which is less faithful.
        key_variable: name of the environment variable with the key; "" sends none. The key itself
            is never written anywhere.
        timeout_s: for a whole answer.
        most_bytes: a longer answer is thrown away.
        extra: further fields of each request.
        environment_proxy: use the proxies that the environment names.
        rows: see `BlackBoxWriter`, as for all that follow.
        retries: likewise.
        backoff_s: likewise.
        most_wait_s: likewise.
        token_budget: likewise.
        money_budget: likewise.
        price_in: likewise.
        price_out: likewise.
        sleep: likewise.

    Raises:
        MissingExtraError: httpx is not installed.
        TeacherError: the address or a setting is wrong, or the variable with the key is empty.
    """
    if find_spec("httpx") is None:
        raise MissingExtraError(
            "got an endpoint, but httpx is not installed; pip install 'vestige[text]'"
        )
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise TeacherError(
            f"got the endpoint {url!r}, expected an address that starts with http:// or https://"
        )
    if parts.username or parts.password:
        raise TeacherError(
            "got an endpoint with a name or password in its address, expected none, since the "
            "address is written into records; put the key into an environment variable and name "
            "that as key_variable"
        )
    if api not in ("completions", "chat") or timeout_s <= 0 or most_bytes < 1:
        raise TeacherError(
            f"got api={api!r}, timeout_s={timeout_s}, most_bytes={most_bytes}, expected "
            "'completions' or 'chat', and values above 0; correct them"
        )
    key = os.environ.get(key_variable, "").strip() if key_variable else ""
    if key_variable and not key:
        raise TeacherError(
            f"got key_variable {key_variable!r}, and no such environment variable is set, expected "
            "the endpoint's key in it; set it, or leave key_variable out"
        )
    client = _Client(
        url,
        model,
        api=api,
        key=key or None,
        timeout_s=timeout_s,
        most_bytes=most_bytes,
        extra=extra or {},
        environment_proxy=environment_proxy,
    )
    return BlackBoxWriter(
        client.ask,
        prompts,
        identity={"endpoint": url, "model": model, "api": api, "extra": dict(extra or {})},
        rows=rows,
        retries=retries,
        backoff_s=backoff_s,
        most_wait_s=most_wait_s,
        token_budget=token_budget,
        money_budget=money_budget,
        price_in=price_in,
        price_out=price_out,
        sleep=sleep,
    )


def _retry_after(value: str | None) -> float | None:
    """Seconds that a server asks to wait: a number, or a date; None for anything else."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _usage(answer: Any, asked: int, texts: list[Written]) -> Spent:
    """Tokens as the server counts them, or about as many."""
    told = answer.get("usage") if isinstance(answer, dict) else None
    told = told if isinstance(told, dict) else {}
    about = asked, sum(tokens_of(one.text) for one in texts)
    counts = [
        value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else guess
        for value, guess in zip(
            (told.get("prompt_tokens"), told.get("completion_tokens")), about, strict=True
        )
    ]
    return Spent(1, counts[0], counts[1])


def _mean(logprobs: Any) -> float | None:
    """Mean log-probability of a choice's tokens, where it tells them."""
    values = logprobs.get("token_logprobs") if isinstance(logprobs, dict) else None
    sound = [
        float(value)
        for value in (values if isinstance(values, list) else [])
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    ]
    return sum(sound) / len(sound) if sound else None
