"""HTTP requests to inference servers. Each answer has a limit of time and of size.

Text from a server is sanitized before it reaches a terminal.
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

CONNECT_SECONDS: Final = 5.0
MAX_BYTES: Final = 1 << 20  # default limit of an answer
MAX_MESSAGE: Final = 300  # characters of a server's message that are shown
_ANSI_ESCAPE: Final = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")


class NoAnswer(Exception):
    """A request got no complete answer. `str()` is the rest of a sentence that starts with the server's URL.

    Attributes:
        unreached: the connection was refused or failed.
        broken: there was no connection, or it ended too early; the server's process may have ended.
        status: the HTTP status of an answer that reports a failure; 0 if there was none.
    """

    def __init__(self, reason: str, unreached: bool = False, broken: bool = False, status: int = 0):
        super().__init__(reason)
        self.unreached, self.broken, self.status = unreached, broken, status


@dataclass(frozen=True)
class Answer:
    """An HTTP status and a body. The body of an unsuccessful answer is cut at the size limit."""

    status: int
    content: bytes

    @property
    def is_success(self) -> bool:
        return 200 <= self.status < 300

    def parse_json(self, url: str) -> dict[str, Any]:
        """Parse the body as a JSON object.

        Raises:
            RunError: it is not a JSON object.
        """
        try:
            content = json.loads(self.content or b"{}")
        except (ValueError, RecursionError):
            content = None
        if not isinstance(content, dict):
            raise RunError(f"{url} did not return a JSON object; is it a vLLM server?", "config")
        return content

    def error_message(self, secret: str) -> str:
        """The server's error message on one line; `secret` is replaced by `***`, as servers may repeat it."""
        try:
            content = json.loads(self.content)
            content = content.get("error", content)
            text = str(content.get("message", content) if isinstance(content, dict) else content)
        except (ValueError, AttributeError, RecursionError):
            text = self.content.decode(errors="replace")
        text = sanitize(text)
        return (text.replace(secret, "***") if secret else text)[:MAX_MESSAGE]


def sanitize(text: str) -> str:
    """Put text on one line and remove terminal control characters."""
    words = " ".join(_ANSI_ESCAPE.sub("", text).split())
    return "".join(char for char in words if char.isprintable())


class Client:
    """Sends requests with these headers. `seconds` limits the time of a whole answer."""

    def __init__(self, headers: Mapping[str, str], seconds: float):
        import httpx

        self.seconds = seconds
        self._http = httpx.AsyncClient(
            headers={"Accept-Encoding": "identity", **headers},
            timeout=httpx.Timeout(seconds, connect=CONNECT_SECONDS, pool=None),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=4.0),
            trust_env=False,  # use no proxy and no stored credentials: the servers are on the same network
        )

    async def get(self, url: str) -> Answer:
        """Send a GET request."""
        return await self._send("GET", url, None, MAX_BYTES)

    async def post(self, url: str, body: dict[str, Any], max_bytes: int = MAX_BYTES) -> Answer:
        """Send a body as JSON.

        Args:
            max_bytes: size limit of the answer.

        Raises:
            NoAnswer: no complete answer came in time.
            RunError: the answer is too large, or compressed.
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
            raise NoAnswer(f"lost the connection ({type(error).__name__})", broken=ended) from error

    def _timeout_error(self) -> NoAnswer:
        return NoAnswer(f"did not answer within {self.seconds:g} s")


async def _read_limited(response: "httpx.Response", url: str, max_bytes: int) -> Answer:
    """Read an answer up to the size limit. A compressed answer is refused: its uncompressed size has no limit."""
    content, encoding = bytearray(), response.headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        if not response.is_success:
            return Answer(response.status_code, b"")
        shown = sanitize(encoding)[:MAX_MESSAGE]
        raise RunError(f"{url} sent Content-Encoding {shown!r}; only uncompressed answers are accepted", "config")
    async with aclosing(response.aiter_raw()) as parts:  # type: ignore[type-var]  # a generator, but httpx declares an iterator
        async for part in parts:
            content += part
            if len(content) > max_bytes:
                break
    if len(content) > max_bytes and response.is_success:
        raise RunError(f"{url} sent more than {max_bytes:,} bytes, the limit of this answer", "config")
    return Answer(response.status_code, bytes(content[:max_bytes]))


def is_healthy(url: str) -> bool:
    """Whether GET /health succeeds; the body is not read."""
    import httpx

    try:
        with httpx.stream("GET", f"{url}/health", timeout=CONNECT_SECONDS, trust_env=False) as response:
            return response.is_success
    except httpx.TransportError:
        return False
