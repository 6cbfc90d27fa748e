"""Calls to a service that may be busy, slow, gone or of another opinion; a key is never said to anyone.

Keys come from the environment alone. What a service says is cleaned of them before it stands in a message.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from embedtune.errors import UserError

Note = Callable[[str], None]
T = TypeVar("T")

KEYS = ("OPENAI_API_KEY", "GOOGLE_API_KEY", "GEMINI_API_KEY")
ATTEMPTS = 6  # of a call that the service is too busy for
ATTEMPTS_GONE = 3  # of a call that reaches no service
FIRST_WAIT, MOST_WAIT = 1.0, 60.0  # seconds; each wait is twice the one before, or what the service asks for
TIMEOUT = 120.0  # seconds
BUSY = (408, 409, 425, 429)
KEY_STATUS = (401, 403)
REFUSED = (400, 413, 422)
SECRET = re.compile(r"\b(?:sk-|AIza)[\w*.-]+|(?<=//)[^/@\s]+(?=@)")
SAID = 200  # characters of what a service says

sleep = time.sleep


class Refused(Exception):
    """The service understood the call and does not want it; the text says why. Asking again would not help."""


class Failure(NamedTuple):
    """What went wrong with a call: busy, gone, key, quota, refused or missing; in words; how long it asks to wait."""

    kind: str
    words: str
    wait: float | None = None


def call(request: Callable[[], T], where: str, note: Note, usage: dict[str, Any]) -> T:
    """Make a call, again and again while the service is busy; `usage` counts "requests" and "retries".

    Raises Refused for what the service does not want, and UserError for all else that the user can mend.
    """
    attempt = 0
    while True:
        attempt += 1
        usage["requests"] += 1
        try:
            return request()
        except Exception as error:
            found = failure(error)
            if found is None:
                raise
        # Raised outside of the handler: the original has the request, with the key in its headers.
        if found.kind == "refused":
            raise Refused(found.words)
        most = {"busy": ATTEMPTS, "gone": ATTEMPTS_GONE}.get(found.kind, 1)
        if attempt >= most:
            raise UserError(_what(found, attempt), where=where, fix=FIXES[found.kind])
        wait = min(MOST_WAIT, found.wait if found.wait is not None else FIRST_WAIT * 2 ** (attempt - 1))
        usage["retries"] += 1
        note(f"{where}: {found.words}; trying again in {wait:g} s")
        sleep(wait)


FIXES = {
    "busy": "wait and run it again; what is finished is not asked for again where it is kept",
    "gone": "check the network and the address",
    "key": "check the key in the environment and what it is allowed to do",
    "quota": "add credit to the account, or use another model",
    "missing": "check the name of the model and the address",
}


def _what(found: Failure, attempts: int) -> str:
    return found.words + (f" ({attempts} attempts)" if attempts > 1 else "")


def failure(error: Exception) -> Failure | None:
    """What an exception of the openai or google-genai client means; None where it is no failure of a call."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    status = getattr(error, "status_code", None) or getattr(error, "code", None)
    if isinstance(status, int) and status >= 400:
        return _status(status, error)
    if kinds & {"APITimeoutError", "TimeoutException", "TimeoutError"}:
        return Failure("busy", "no answer in time")
    if kinds & {"APIConnectionError", "TransportError", "ConnectionError", "ClientConnectionError"}:
        cause = type(error.__cause__ or error).__name__
        return Failure("gone", f"cannot be reached, or broke off ({cause})")
    if kinds & {"GoogleAuthError"}:
        return Failure("key", "the credentials are missing or not accepted")
    if kinds & {"JSONDecodeError", "UnicodeDecodeError", "APIResponseValidationError"}:
        return Failure("gone", "the answer is not JSON: is this the address of such a service?")
    return None


def _status(status: int, error: Exception) -> Failure:
    said = scrub(str(getattr(error, "message", "") or error))
    if status == 429 and "insufficient_quota" in f"{getattr(error, 'code', '')} {error}":
        return Failure("quota", "the account has no credit left (HTTP 429, insufficient_quota)")
    if status in BUSY or status >= 500:
        return Failure("busy", f"the service is busy or broken (HTTP {status})", retry_after(error))
    if status in KEY_STATUS:
        # Not what it says: services quote the key.
        return Failure("key", f"the key is not accepted (HTTP {status})")
    if status in REFUSED:
        return Failure("refused", f"the service refuses (HTTP {status}): {said}")
    return Failure("missing", f"no such model or address (HTTP {status}): {said}")


def retry_after(error: Exception) -> float | None:
    """The seconds that the service asks to wait (Retry-After, or retry-after-ms), if it does."""
    headers = getattr(getattr(error, "response", None), "headers", None) or {}
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) / unit
        except ValueError:
            continue  # a date, or nothing
        if 0 <= seconds < float("inf"):
            return seconds
    return None


def scrub(text: str) -> str:
    """One short line without keys and without the user's name and password in an address."""
    for name in KEYS:
        if key := os.environ.get(name, "").strip():
            text = text.replace(key, "***")
    text = SECRET.sub("***", " ".join(text.split()))
    return text[:SAID] + ("..." if len(text) > SAID else "")


def environment_key(name: str, where: str) -> str | None:
    """A key out of the environment, stripped; None where it is unset or blank. Raises UserError for a broken one."""
    key = os.environ.get(name, "").strip()
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise UserError(
            f"the key in {name} holds a blank or a character that no key has", where=where, fix="set it anew"
        )
    return key or None


def check_address(address: str, where: str) -> str:
    """The address without a slash at its end; a UserError where it is none."""
    try:
        parts = urlsplit(address.strip())
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        sound = False
    if not sound or not address.isprintable():
        what = f"is no address: {scrub(address)!r}"
        raise UserError(what, where=where, fix="give one such as http://localhost:8000/v1")
    return address.strip().rstrip("/")


def openai_client(address: str | None, where: str, note: Note) -> tuple[Any, str]:
    """A client of an OpenAI-compatible service, and its address without secrets.

    The address is `address`, or OPENAI_BASE_URL, or OpenAI's own; only the last needs OPENAI_API_KEY. The client
    itself never tries again: `call` does. Raises UserError where the package, the key or a sound address is missing.
    """
    address = address or os.environ.get("OPENAI_BASE_URL") or None
    address = check_address(address, where) if address else None
    key = environment_key("OPENAI_API_KEY", where)
    if not key and not address:
        fix = "export OPENAI_API_KEY=..., or name a service of your own with OPENAI_BASE_URL=http://localhost:8000/v1"
        raise UserError("OPENAI_API_KEY is not set", where=where, fix=fix)
    try:
        from openai import OpenAI
    except ImportError as error:
        raise UserError("needs another package, openai", where=where, fix="pip install openai") from error
    if key and address and address.startswith("http://") and not _local(address):
        note(f"{where}: the key in OPENAI_API_KEY goes to {scrub(address)} unencrypted")
    client = OpenAI(api_key=key or "none", base_url=address, max_retries=0, timeout=TIMEOUT)
    return client, scrub(address or str(client.base_url))


def _local(address: str) -> bool:
    host = urlsplit(address).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def body(raw: Any, where: str) -> dict[str, Any]:
    """The JSON object of a raw answer; a UserError where it is none."""
    try:
        answer = json.loads(raw.text)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        what = "the answer is no JSON object: is this the address of such a service?"
        raise UserError(what, where=where, fix=FIXES["gone"])
    return answer


def whole_number(value: Any) -> int:
    """A count out of an answer; 0 where there is none."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else 0
