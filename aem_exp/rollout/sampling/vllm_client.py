"""The client of a run's vLLM servers: selects the server of a request, retries requests, and updates weights.

A restarted server receives the newest weights before it generates, and each update is checked (`agreement`).
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
from aem_exp.core.console import NOTE
from aem_exp.core.errors import RunError
from aem_exp.rollout.sampling.http import NoAnswer
from aem_exp.rollout.sampling.served_weights import ServedWeights
from aem_exp.rollout.sampling.vllm_api import COMPLETIONS, Api, LoadFailed

log = logging.getLogger("aem_exp")
T = TypeVar("T")
FIRST_PAUSE, MAX_PAUSE = 0.2, 5.0  # seconds before a retry: at first, and at most
LOAD_SECONDS: Final = 60.0  # limit of the time in which a server fails to load weights
WARNING_INTERVAL: Final = 60.0  # minimum seconds between two warnings about the same server


class Servers:
    """All servers of a run. Methods may be called from several threads.

    Args:
        folder: contains the servers' addresses and their API key (see `cluster.rendezvous`).
        seconds: limit of the time for one answer, and of the time without an answer from any server; then the run ends.
    """

    def __init__(self, folder: Path, seconds: float):
        self.folder, self.seconds = folder, seconds
        self.urls, key = rendezvous.read_urls(folder)
        self._api = Api(folder, key, seconds)
        self.weights = ServedWeights(self._api)
        self._up_to_date = set(self.urls)  # servers with the newest weights
        self._retry_at: dict[str, float] = {}  # earliest next request to a server that did not answer (monotonic time)
        self._warned_at: dict[str, float] = {}  # last warning about a server that did not answer (monotonic time)
        self._update_locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._cancelled = False
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True, name="servers").start()

    @property
    def headers(self) -> dict[str, str]:
        """Request headers: the servers' API key, if they have one."""
        return self._api.headers

    def complete(
        self, requests: list[dict[str, Any]], preferred: list[int], max_bytes: list[int]
    ) -> list[dict[str, Any]]:
        """Send all completions requests at once, each to one server; return the answers in the same order.

        Args:
            preferred: for each request, the index of the server to try first (modulo the number of servers).
            max_bytes: for each request, the size limit of its answer.

        Raises:
            RunError: a server refuses a request, or no server has answered for `seconds`.
            CancelledError: `cancel` was called.
        """

        def make_send(request: dict[str, Any], size: int) -> Callable[[str], Awaitable[dict[str, Any]]]:
            return lambda url: self._api.post(url, COMPLETIONS, self.weights.request(request), size)

        sends = list(zip(preferred, map(make_send, requests, max_bytes), strict=True))
        return self._run(lambda: _gather([partial(self._send_with_retries, index, send) for index, send in sends]))

    def load(self, folder: Path, adapter: str = "") -> None:
        """Make the servers load the weights in a folder, and wait for it. A server that is down loads them when it is back.

        Args:
            adapter: a new name for these weights, if they are a LoRA adapter; requests are then answered with this adapter.
        """
        self.mark_updated(folder, adapter)
        self._up_to_date = set()
        self._run(
            lambda: _gather([partial(self._send_with_retries, index, _send_nothing) for index in range(len(self.urls))])
        )

    def require_weights(self, folder: Path, names: Sequence[str], context: int) -> None:
        """Make the servers use the weights in a folder: they load them, or were started with them.

        Args:
            names: names of these weights that a server may report (see `policy.weight_names`).
            context: number of tokens that each server must accept.

        Raises:
            WrongWeights: a server has other weights and cannot load these.
            RunError: a server accepts fewer tokens, or no server has answered for `seconds`.
        """
        self.weights.names, self.weights.context = names, context
        self.load(folder)

    def mark_updated(self, folder: Path | None, adapter: str = "") -> None:
        """Record that the servers have the newest weights: loaded from this folder, or streamed (None)."""
        self.weights.replace(folder, adapter)
        self._up_to_date = set(self.urls)

    def check_all(self) -> None:
        """Check that all servers have the newest weights.

        Raises:
            WeightsDiffer: a server has other weights.
            RunError: a server accepts too few tokens, or no server has answered for `seconds`.
        """
        indices = range(len(self.urls))
        self._run(lambda: _gather([partial(self._send_with_retries, i, self.weights.check) for i in indices]))

    def cancel(self) -> None:
        """Make all waiting calls fail, and all later calls too."""
        self._cancelled = True
        asyncio.run_coroutine_threadsafe(self._cancel_tasks(), self._loop)

    def _run(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        if self._cancelled:
            raise CancelledError
        future = asyncio.run_coroutine_threadsafe(work(), self._loop)
        try:
            return future.result()
        except BaseException:  # for example Ctrl-C: the servers stop too
            future.cancel()
            raise

    async def _cancel_tasks(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._api.close()  # closed connections make the servers stop generating

    async def _send_with_retries(self, preferred: int, send: Callable[[str], Awaitable[T]]) -> T:
        """Call `send` until a server answers."""
        pause, since = FIRST_PAUSE, 0.0
        while True:
            url = self._pick_server(preferred)
            await asyncio.sleep(self._retry_at.get(url, 0.0) - time.monotonic())  # no pause for a server that answers
            try:
                if url not in self._up_to_date:
                    await self._update_weights(url)
                answer = await send(url)
            except NoAnswer as error:
                reason, failed_to_load = f"{url} {error}", isinstance(error, LoadFailed)
                if error.unreached or (error.broken and not self.weights.streamed):
                    self._up_to_date.discard(url)  # it may have restarted with old weights: load the newest again
            else:
                if self._retry_at.pop(url, None) and since:
                    log.log(NOTE, "%s answers again", url)
                return answer
            now = time.monotonic()
            since = since or now
            self._warn_or_stop(url, reason, now - since, failed_to_load)
            self._retry_at[url] = now + pause * random.uniform(0.5, 1.5)  # spread the retries of concurrent requests
            pause = min(2 * pause, MAX_PAUSE)
            self.urls = rendezvous.reread_urls(self.folder, self.urls)

    def _warn_or_stop(self, url: str, reason: str, waited: float, failed_to_load: bool) -> None:
        """Warn once that a server does not answer; end the run if a server has ended for good or the limit is reached."""
        if ended := rendezvous.read_ended(self.folder):
            raise RunError(f"{ended}; {reason}", "node")
        if failed_to_load and waited > LOAD_SECONDS:
            remedy = "look at its output, and start it again with the settings of this run"
            raise RunError(f"a server could not load the weights for {waited:.0f} s: {reason}; {remedy}", "node")
        if waited > self.seconds:
            setting = "the limit is launch.server_seconds"
            raise RunError(f"no server has answered for {waited:.0f} s ({setting}); last attempt: {reason}", "node")
        now = time.monotonic()
        if url not in self._retry_at and now - self._warned_at.get(url, -WARNING_INTERVAL) >= WARNING_INTERVAL:
            self._warned_at[url] = now
            limit = min(self.seconds, LOAD_SECONDS) if failed_to_load else self.seconds
            log.warning("%s; retrying for up to %g s", reason, limit)

    def _pick_server(self, preferred: int) -> str:
        """The preferred server if it answers; else the next one that does, or the one with the earliest retry."""
        now, count = time.monotonic(), len(self.urls)
        order = [self.urls[(preferred + i) % count] for i in range(count)]
        return min(order, key=lambda url: max(0.0, self._retry_at.get(url, 0.0) - now))

    async def _update_weights(self, url: str) -> None:
        """Make a server load the newest weights, if there are any."""
        async with self._update_locks[url]:
            if url not in self._up_to_date:
                await self.weights.send(url)
                self._up_to_date.add(url)


async def _send_nothing(url: str) -> None: ...


async def _gather(work: list[Callable[[], Coroutine[Any, Any, T]]]) -> list[T]:
    """Run all coroutines concurrently; the first error cancels the others."""
    tasks = [asyncio.ensure_future(each()) for each in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
