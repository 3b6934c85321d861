"""The client of a run's vLLM servers: which server gets a request, when a request is sent again, and how a restarted
server gets the newest weights before it generates.
"""

import asyncio
import logging
import random
import threading
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import CancelledError
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

from aem_exp.cluster import rendezvous
from aem_exp.core.errors import RunError
from aem_exp.rollout.sampling.http import Answer, Client, NoAnswer, sanitize

log = logging.getLogger("aem_exp")
T = TypeVar("T")
MODELS = "/v1/models"
# Of vLLM, with VLLM_SERVER_DEV_MODE=1 in its environment.
RELOAD_WEIGHTS, RESET_CACHE = "/collective_rpc", "/reset_prefix_cache"
FIRST_PAUSE, MAX_PAUSE = 0.2, 5.0  # seconds before a request is sent again: at first, and at most
RETRYABLE_STATUS = (408, 409, 425, 429)  # of the 4xx: it may be answered later
WARNING_INTERVAL: Final = 60.0  # seconds between two warnings of one server that comes and goes
SHOWN_CHARACTERS: Final = 100  # characters of a name that a server gives its weights


class Servers:
    """All servers of a run.

    Args:
        folder: says where they are.
        seconds: how long a server may take for an answer, and how long none may give one, before the run ends.
    """

    def __init__(self, folder: Path, seconds: float):
        self.folder, self.seconds = folder, seconds
        self.urls, self._key = rendezvous.read_urls(folder)
        self.weights: Path | None = None  # the newest, where they are files; a server that was away reads them
        self.names: Sequence[str] = ()  # of the newest, in an evaluation: a server may have been started with them
        self.context = 0  # tokens that a server must take
        self.streamed = False  # the newest were sent from GPU to GPU; a server that was away has lost them
        self._up_to_date = set(self.urls)  # servers that have the newest weights
        self._retry_at: dict[str, float] = {}  # when to send to a server that did not answer (monotonic)
        self._warned_at: dict[str, float] = {}  # when a server that does not answer was last warned of (monotonic)
        self._update_locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._client = Client(self.headers, seconds)
        self._cancelled = False
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True, name="servers").start()

    @property
    def headers(self) -> dict[str, str]:
        """The headers of a request: the key of the servers, where they have one."""
        return {"Authorization": f"Bearer {self._key}"} if self._key else {}

    def ask(
        self, path: str, bodies: list[dict[str, Any]], firsts: list[int], max_bytes: list[int]
    ) -> list[dict[str, Any]]:
        """Post each body to a server, all at a time; their answers. Several threads may call it.

        Args:
            firsts: for each body, the number of the server to try first.
            max_bytes: for each body, bytes that its answer may have.

        Raises:
            RunError: a server refuses, or none has answered for too long.
            CancelledError: `cancel` was called.
        """

        def make_send(body: dict[str, Any], size: int) -> Callable[[str], Awaitable[dict[str, Any]]]:
            return lambda url: self._post(url + path, body, size)

        sends = list(zip(firsts, map(make_send, bodies, max_bytes), strict=True))
        return self._run(lambda: _gather([partial(self._send_with_retries, first, send) for first, send in sends]))

    def load(self, folder: Path) -> None:
        """Have the servers read the weights of a folder, and return when they have; one that is away does it when it is back."""
        self.weights, self._up_to_date = folder, set()
        self._run(
            lambda: _gather([partial(self._send_with_retries, first, _send_nothing) for first in range(len(self.urls))])
        )

    def require_weights(self, folder: Path, names: Sequence[str], context: int) -> None:
        """Have the servers play as they are with the weights of a folder, which `names` may name, and with so long a context.

        Raises:
            WrongWeights: one has other weights and does not read these.
            RunError: one takes no such context, or none has answered for too long.
        """
        self.names, self.context = names, context
        self.load(folder)

    def mark_updated(self, weights: Path | None) -> None:
        """Note that another process has sent the newest weights: those of a folder, or streamed (None)."""
        self.weights, self.streamed, self._up_to_date = weights, weights is None, set(self.urls)

    def cancel(self) -> None:
        """Make all calls that wait for an answer fail, now and from now on."""
        self._cancelled = True
        asyncio.run_coroutine_threadsafe(self._cancel_tasks(), self._loop)

    def _run(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        if self._cancelled:
            raise CancelledError
        future = asyncio.run_coroutine_threadsafe(work(), self._loop)
        try:
            return future.result()
        except BaseException:  # Ctrl-C, say: the servers need not go on either
            future.cancel()
            raise

    async def _cancel_tasks(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._client.close()  # servers see it, and stop

    async def _send_with_retries(self, first: int, send: Callable[[str], Awaitable[T]]) -> T:
        """Send something until it is answered."""
        pause, since = FIRST_PAUSE, 0.0
        while True:
            url = self._pick_server(first)
            await asyncio.sleep(self._retry_at.get(url, 0.0) - time.monotonic())  # at once where it is not away
            try:
                if url not in self._up_to_date:
                    await self._update_weights(url)
                answer = await send(url)
            except NoAnswer as error:
                why = f"{url} {error}"
                if error.unreached or (error.broken and not self.streamed):
                    self._up_to_date.discard(url)  # to read the weights once more costs less than to have old ones
            else:
                self._retry_at.pop(url, None)
                return answer
            now = time.monotonic()
            since = since or now
            self._warn_or_stop(url, why, now - since)
            self._retry_at[url] = now + pause * random.uniform(0.5, 1.5)  # not all at the same moment
            pause = min(2 * pause, MAX_PAUSE)
            self.urls = rendezvous.reread_urls(self.folder, self.urls)

    def _warn_or_stop(self, url: str, why: str, waited: float) -> None:
        """Say once that a server does not answer, or end the run: it is gone for good, or the limit is reached."""
        if gone := rendezvous.read_ended(self.folder):
            raise RunError(f"{gone}; {why}", "node")
        if waited > self.seconds:
            raise RunError(
                f"no server has answered for {waited:.0f} s (launch.server_seconds); the last: {why}", "node"
            )
        now = time.monotonic()
        if url not in self._retry_at and now - self._warned_at.get(url, -WARNING_INTERVAL) >= WARNING_INTERVAL:
            self._warned_at[url] = now
            log.warning("%s, asking again for up to %g s", why, self.seconds)

    def _pick_server(self, first: int) -> str:
        """The server at a number; where that is away, the next one that is not, or that is tried again soonest."""
        now, count = time.monotonic(), len(self.urls)
        order = [self.urls[(first + i) % count] for i in range(count)]
        return min(order, key=lambda url: max(0.0, self._retry_at.get(url, 0.0) - now))

    async def _update_weights(self, url: str) -> None:
        """Have a server read the newest weights, if there are any."""
        async with self._update_locks[url]:
            if url in self._up_to_date:
                return
            if self.streamed:
                lost = "was started anew and has lost the weights, which launch.server_weights=nccl sends between steps"
                raise RunError(f"{url} {lost}; ask the run again, and it goes on from its newest checkpoint", "node")
            if self.names:
                await self._check_weights(url)
            elif self.weights is not None:
                await self._reload_weights(url)
            self._up_to_date.add(url)

    async def _reload_weights(self, url: str) -> None:
        """Have a server read the newest weights."""
        request = {"method": "reload_weights", "kwargs": {"weights_path": str(self.weights)}}
        await self._post(url + RELOAD_WEIGHTS, request)
        await self._post(url + RESET_CACHE, {})

    async def _check_weights(self, url: str) -> None:
        """Make sure that a server has the required weights: it reads them, or was started with them and reads none."""
        cards = _model_cards(self._check_answer(url + MODELS, await self._client.get(url + MODELS)))
        limits = [card.get("max_model_len") for card in cards]
        longest = min((limit for limit in limits if type(limit) is int and limit > 0), default=self.context)
        if longest < self.context:
            mismatch = f"takes {longest:,} tokens at most, and env.context_tokens={self.context}"
            raise RunError(f"{url} {mismatch}: start it with --max-model-len {self.context}", "config")
        try:
            await self._reload_weights(url)
        except _RequestRefused as refused:
            if refused.status != 404:
                raise WrongWeights(f"{refused}; it does not read {self.weights}", "config") from None
            self._check_started_with(url, [sanitize(str(card.get("root") or card.get("id"))) for card in cards])

    def _check_started_with(self, url: str, roots: list[str]) -> None:
        """Refuse a server that was started with other weights, by its own model card."""
        names = {*roots, *(str(Path(root).resolve()) for root in roots if root.startswith("/"))}
        if not names & set(self.names):
            has = f"has {', '.join(root[:SHOWN_CHARACTERS] for root in roots[:9]) or 'no model'}, and reads no other weights"
            remedy = f"start it with {self.weights}, or with VLLM_SERVER_DEV_MODE=1 in its environment"
            raise WrongWeights(f"{url} {has}: {remedy}", "config")
        if not any(name.startswith("/") for name in names & set(self.names)):
            log.warning(
                "%s says that it has %s, and not which revision; here is %s",
                url,
                roots[0][:SHOWN_CHARACTERS],
                self.weights,
            )

    async def _post(self, url: str, body: dict[str, Any], *max_bytes: int) -> dict[str, Any]:
        return self._check_answer(url, await self._client.post(url, body, *max_bytes))

    def _check_answer(self, url: str, answer: Answer) -> dict[str, Any]:
        if answer.is_success:
            return answer.parse_json(url)
        status, words = answer.status, answer.error_message(self._key)
        answered = f"answers {status} ({words})" if words else f"answers {status}"
        unread = status == 500 and self.names and url.endswith(RELOAD_WEIGHTS)  # of a folder that has long been there
        if (status in RETRYABLE_STATUS or status >= 500) and not unread:
            raise NoAnswer(answered)
        hint = {
            401: f"; is {self.folder / rendezvous.KEY} its key?",
            404: "; does it have VLLM_SERVER_DEV_MODE=1 in its environment?"
            if url.endswith((RELOAD_WEIGHTS, RESET_CACHE))
            else "",
        }
        raise _RequestRefused(f"{url} {answered}{hint.get(status, '')}", status)


class WrongWeights(RunError):
    """A server has other weights than the required ones, and does not read those."""


class _RequestRefused(RunError):
    """A server has refused a request; it would refuse it again."""

    def __init__(self, sentence: str, status: int):
        super().__init__(sentence, "config")
        self.status = status


async def _send_nothing(url: str) -> None: ...


async def _gather(work: list[Callable[[], Coroutine[Any, Any, T]]]) -> list[T]:
    """Run all at a time; the first that fails cancels the others."""
    tasks = [asyncio.ensure_future(each()) for each in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def _model_cards(answer: dict[str, Any]) -> list[dict[str, Any]]:
    """The models that a server says it has, adapters left out."""
    data = answer.get("data")
    return [card for card in data if isinstance(card, dict) and not card.get("parent")] if type(data) is list else []
