"""HTTP requests to servers, with a limit of time and of size for every answer.

Text of a server is cleaned before it reaches a terminal.
"""

import asyncio
import json
import re
from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from aem_exp.core.errors import RunError

if TYPE_CHECKING:
    import httpx

CONNECT_SECONDS: Final = 5.0  # seconds
MAX_BYTES: Final = 1 << 20  # bytes of an answer that is not tokens
MAX_MESSAGE: Final = 300  # characters of a server's own words
_ANSI_ESCAPE: Final = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")


class NoAnswer(Exception):
    """No complete answer came; `str()` says why, to be read after the server's address.

    Attributes:
        unreached: there was no connection.
        broken: there was none, or it ended too early: the server's process may have ended.
    """

    def __init__(self, why: str, unreached: bool = False, broken: bool = False):
        super().__init__(why)
        self.unreached, self.broken = unreached, broken


@dataclass(frozen=True)
class Answer:
    """A status and a body, which is cut at the limit where the status is no success."""

    status: int
    content: bytes

    @property
    def is_success(self) -> bool:
        return 200 <= self.status < 300

    def parse_json(self, url: str) -> dict[str, Any]:
        """The body as a JSON object. Raises RunError where it is none."""
        try:
            content = json.loads(self.content or b"{}")
        except (ValueError, RecursionError):
            content = None
        if not isinstance(content, dict):
            raise RunError(f"{url} answers with something that is no JSON object: is it a server of vLLM's?", "config")
        return content

    def error_message(self, secret: str) -> str:
        """The server's message about a failure, on one line, without a secret that it may repeat."""
        try:
            content = json.loads(self.content)
            content = content.get("error", content)
            text = str(content.get("message", content) if isinstance(content, dict) else content)
        except (ValueError, AttributeError, RecursionError):
            text = self.content.decode(errors="replace")
        text = sanitize(text)
        return (text.replace(secret, "***") if secret else text)[:MAX_MESSAGE]


def sanitize(text: str) -> str:
    """Text on one line, without characters that a terminal would obey."""
    words = " ".join(_ANSI_ESCAPE.sub("", text).split())
    return "".join(char for char in words if char.isprintable())


class Client:
    """Sends requests. `seconds`: the longest that a whole answer may take."""

    def __init__(self, headers: Mapping[str, str], seconds: float):
        import httpx

        self.seconds = seconds
        self._http = httpx.AsyncClient(
            headers={"Accept-Encoding": "identity", **headers},
            timeout=httpx.Timeout(seconds, connect=CONNECT_SECONDS, pool=None),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=4.0),
            trust_env=False,  # servers are on the same network: no proxy, and no stored credentials
        )

    async def get(self, url: str) -> Answer:
        return await self._send("GET", url, None, MAX_BYTES)

    async def post(self, url: str, body: dict[str, Any], max_bytes: int = MAX_BYTES) -> Answer:
        """Post a body as JSON.

        Args:
            max_bytes: of the answer.

        Raises:
            NoAnswer: none came, or not all of it in time.
            RunError: it is too large, or compressed.
        """
        return await self._send("POST", url, body, max_bytes)

    async def close(self) -> None:
        await self._http.aclose()

    async def _send(self, method: str, url: str, body: dict[str, Any] | None, max_bytes: int) -> Answer:
        import httpx

        try:
            async with asyncio.timeout(self.seconds), self._http.stream(method, url, json=body) as response:
                return await _read_limited(response, url, max_bytes)
        except TimeoutError:
            raise self._timeout_error() from None
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            refused = isinstance(error, httpx.ConnectError)
            raise NoAnswer("cannot be reached", unreached=refused, broken=refused) from error
        except httpx.TimeoutException as error:
            raise self._timeout_error() from error
        except httpx.TransportError as error:
            ended = isinstance(error, httpx.NetworkError | httpx.RemoteProtocolError)
            raise NoAnswer(f"broke off ({type(error).__name__})", broken=ended) from error

    def _timeout_error(self) -> NoAnswer:
        return NoAnswer(f"gave no answer within {self.seconds:g} s")


async def _read_limited(response: "httpx.Response", url: str, max_bytes: int) -> Answer:
    """Read an answer as it comes; uncompressed it could be of any size, so it must not be compressed."""
    content, encoding = bytearray(), response.headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        if not response.is_success:
            return Answer(response.status_code, b"")
        raise RunError(
            f"{url} answers in the encoding {sanitize(encoding)[:MAX_MESSAGE]!r}, which nobody asked for", "config"
        )
    async with aclosing(response.aiter_raw()) as parts:  # type: ignore[type-var]  # it is a generator, which httpx does not say
        async for part in parts:
            content += part
            if len(content) > max_bytes:
                break
    if len(content) > max_bytes and response.is_success:
        raise RunError(f"{url} answers with more than the {max_bytes:,} bytes that its answer may have", "config")
    return Answer(response.status_code, bytes(content[:max_bytes]))


def is_healthy(url: str) -> bool:
    """Whether a server answers; the answer is not read."""
    import httpx

    try:
        with httpx.stream("GET", f"{url}/health", timeout=CONNECT_SECONDS, trust_env=False) as response:
            return response.is_success
    except httpx.TransportError:
        return False
