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
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from aem_exp.cluster import rendezvous
from aem_exp.core.errors import RunError
from aem_exp.rollout.sampling.http import Answer, Client, NoAnswer, sanitize

if TYPE_CHECKING:
    from aem_exp.rollout.sampling.agreement import Agreement  # imports torch, which the first checks do not need

log = logging.getLogger("aem_exp")
T = TypeVar("T")
MODELS = "/v1/models"
COMPLETIONS: Final = "/v1/completions"
# Endpoints that vLLM has only with VLLM_SERVER_DEV_MODE=1 in its environment.
RELOAD_WEIGHTS, RESET_CACHE = "/collective_rpc", "/reset_prefix_cache"
# Endpoints that vLLM has only with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment.
LOAD_ADAPTER, UNLOAD_ADAPTER = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
FIRST_PAUSE, MAX_PAUSE = 0.2, 5.0  # seconds before a retry: at first, and at most
RETRYABLE_STATUS = (408, 409, 425, 429)  # the 4xx statuses that may succeed later
WARNING_INTERVAL: Final = 60.0  # minimum seconds between two warnings about the same server
SHOWN_CHARACTERS: Final = 100  # characters of a server's model name in messages


class Servers:
    """All servers of a run. Methods may be called from several threads.

    Args:
        folder: contains the servers' addresses and their API key (see `cluster.rendezvous`).
        seconds: limit of the time for one answer, and of the time without an answer from any server; then the run ends.
    """

    def __init__(self, folder: Path, seconds: float):
        self.folder, self.seconds = folder, seconds
        self.urls, self._key = rendezvous.read_urls(folder)
        self.weights: Path | None = None  # folder of the newest weights, if they are files; restarted servers load it
        self.adapter = ""  # name of the newest LoRA adapter, if `weights` is the folder of an adapter
        self.agreement: Agreement | None = None  # compares each server with the trainer after an update
        self.names: Sequence[str] = ()  # in evaluation: names of these weights, as a server may report them
        self.context = 0  # number of tokens that a server must accept; 0: not checked
        self._old_adapter = ""  # name of the adapter before the newest one
        self.streamed = False  # the newest weights were sent from GPU to GPU; a restarted server has lost them
        self._up_to_date = set(self.urls)  # servers with the newest weights
        self._retry_at: dict[str, float] = {}  # earliest next request to a server that did not answer (monotonic time)
        self._warned_at: dict[str, float] = {}  # last warning about a server that did not answer (monotonic time)
        self._update_locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._client = Client(self.headers, seconds)
        self._cancelled = False
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True, name="servers").start()

    @property
    def headers(self) -> dict[str, str]:
        """Request headers: the servers' API key, if they have one."""
        return {"Authorization": f"Bearer {self._key}"} if self._key else {}

    def post_all(
        self, path: str, bodies: list[dict[str, Any]], preferred: list[int], max_bytes: list[int]
    ) -> list[dict[str, Any]]:
        """Send all bodies at once, each to one server; return the answers in the same order.

        Args:
            preferred: for each body, the index of the server to try first (modulo the number of servers).
            max_bytes: for each body, the size limit of its answer.

        Raises:
            RunError: a server refuses a request, or no server has answered for `seconds`.
            CancelledError: `cancel` was called.
        """

        def make_send(body: dict[str, Any], size: int) -> Callable[[str], Awaitable[dict[str, Any]]]:
            return lambda url: self._post(url + path, body, size)

        sends = list(zip(preferred, map(make_send, bodies, max_bytes), strict=True))
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
        self.names, self.context = names, context
        self.load(folder)

    def mark_updated(self, weights: Path | None, adapter: str = "") -> None:
        """Record that the servers have the newest weights: loaded from this folder, or streamed (None)."""
        self.weights, self.streamed, self._up_to_date = weights, weights is None, set(self.urls)
        self._old_adapter, self.adapter = self.adapter, adapter

    def compare_all(self) -> None:
        """Compare all servers with the trainer.

        Raises:
            WeightsDiffer: a server has other weights.
        """

        async def compare(url: str) -> None:
            if self.context:
                await self._check_context(url)
            await self._compare(url)

        self._run(lambda: _gather([partial(self._send_with_retries, i, compare) for i in range(len(self.urls))]))

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
        await self._client.close()  # closed connections make the servers stop generating

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
                reason = f"{url} {error}"
                if error.unreached or (error.broken and not self.streamed):
                    self._up_to_date.discard(
                        url
                    )  # it may have restarted: load the weights again rather than use old ones
            else:
                self._retry_at.pop(url, None)
                return answer
            now = time.monotonic()
            since = since or now
            self._warn_or_stop(url, reason, now - since)
            self._retry_at[url] = now + pause * random.uniform(0.5, 1.5)  # spread the retries of concurrent requests
            pause = min(2 * pause, MAX_PAUSE)
            self.urls = rendezvous.reread_urls(self.folder, self.urls)

    def _warn_or_stop(self, url: str, reason: str, waited: float) -> None:
        """Warn once that a server does not answer; end the run if a server has ended for good or the limit is reached."""
        if ended := rendezvous.read_ended(self.folder):
            raise RunError(f"{ended}; {reason}", "node")
        if waited > self.seconds:
            limit = "the limit is launch.server_seconds"
            raise RunError(f"no server has answered for {waited:.0f} s ({limit}); last attempt: {reason}", "node")
        now = time.monotonic()
        if url not in self._retry_at and now - self._warned_at.get(url, -WARNING_INTERVAL) >= WARNING_INTERVAL:
            self._warned_at[url] = now
            log.warning("%s; retrying for up to %g s", reason, self.seconds)

    def _pick_server(self, preferred: int) -> str:
        """The preferred server if it answers; else the next one that does, or the one with the earliest retry."""
        now, count = time.monotonic(), len(self.urls)
        order = [self.urls[(preferred + i) % count] for i in range(count)]
        return min(order, key=lambda url: max(0.0, self._retry_at.get(url, 0.0) - now))

    async def _update_weights(self, url: str) -> None:
        """Make a server load the newest weights, if there are any."""
        async with self._update_locks[url]:
            if url in self._up_to_date:
                return
            if self.streamed:
                lost = (
                    "was restarted and has lost its weights (launch.server_weights=nccl sends them between steps only)"
                )
                raise RunError(f"{url} {lost}; start the run again to resume from its newest checkpoint", "node")
            if self.context:
                await self._check_context(url)
            if self.names:
                await self._check_weights(url)
            elif self.adapter:
                await self._load_adapter(url)
            elif self.weights is not None:
                await self._reload_weights(url)
            if self.weights is not None:
                await self._compare(url)
            self._up_to_date.add(url)

    async def _reload_weights(self, url: str) -> None:
        """Make a server load the newest weights and clear its prefix cache."""
        request = {"method": "reload_weights", "kwargs": {"weights_path": str(self.weights)}}
        await self._post(url + RELOAD_WEIGHTS, request)
        await self._post(url + RESET_CACHE, {})

    async def _check_context(self, url: str) -> None:
        """Refuse a server that accepts fewer tokens than episodes may have."""
        limits = [card.get("max_model_len") for card in _model_cards(await self._get_models(url))]
        longest = min((limit for limit in limits if type(limit) is int and limit > 0), default=self.context)
        if longest < self.context:
            mismatch = f"accepts at most {longest:,} tokens, fewer than env.context_tokens={self.context}"
            raise RunError(f"{url} {mismatch}; start it with --max-model-len {self.context}", "config")

    async def _load_adapter(self, url: str) -> None:
        """Make a server load the newest LoRA adapter and drop the one before it. The prefix cache knows adapters by name."""
        if self.adapter not in _model_ids(await self._get_models(url)):
            await self._command(url + LOAD_ADAPTER, {"lora_name": self.adapter, "lora_path": str(self.weights)})
        if self._old_adapter:
            with suppress(_RequestRefused):  # a restarted server never had it
                await self._command(url + UNLOAD_ADAPTER, {"lora_name": self._old_adapter})

    async def _compare(self, url: str) -> None:
        """Compare a server with the trainer on the fixed prompts."""
        if self.agreement is None:
            return
        from aem_exp.rollout.sampling.agreement import TOP_TOKENS

        body = {
            "prompt": self.agreement.prompts,
            "max_tokens": 1,
            "temperature": 1.0,
            "logprobs": TOP_TOKENS,
            "return_tokens_as_token_ids": True,
        }
        answer = await self._post(url + COMPLETIONS, body)
        self.agreement.compare(url, _parse_next_tokens(url, answer, len(self.agreement.prompts)))

    async def _check_weights(self, url: str) -> None:
        """Make sure that a server has the required weights: it loads them, or was started with them and cannot load any."""
        cards = _model_cards(await self._get_models(url))
        try:
            await self._reload_weights(url)
        except _RequestRefused as refused:
            if refused.status != 404:
                raise WrongWeights(f"{refused}; it cannot load {self.weights}", "config") from None
            self._check_started_with(url, [sanitize(str(card.get("root") or card.get("id"))) for card in cards])

    def _check_started_with(self, url: str, roots: list[str]) -> None:
        """Refuse a server whose model card names other weights; warn if it does not name the revision."""
        names = {*roots, *(str(Path(root).resolve()) for root in roots if root.startswith("/"))}
        if not names & set(self.names):
            models = ", ".join(root[:SHOWN_CHARACTERS] for root in roots[:9]) or "no model"
            remedy = f"start it with {self.weights}, or with VLLM_SERVER_DEV_MODE=1 in its environment"
            raise WrongWeights(f"{url} serves {models} and cannot load other weights; {remedy}", "config")
        if not any(name.startswith("/") for name in names & set(self.names)):
            warning = "%s serves %s but does not report its revision; the expected weights are %s"
            log.warning(warning, url, roots[0][:SHOWN_CHARACTERS], self.weights)

    async def _get_models(self, url: str) -> dict[str, Any]:
        return self._check_answer(url + MODELS, await self._client.get(url + MODELS))

    async def _post(self, url: str, body: dict[str, Any], *max_bytes: int) -> dict[str, Any]:
        if self.adapter and url.endswith(COMPLETIONS):
            body = body | {"model": self.adapter}
        return self._check_answer(url, await self._client.post(url, body, *max_bytes))

    async def _command(self, url: str, body: dict[str, Any]) -> None:
        """Send a request whose answer is only a status; its text need not be JSON."""
        self._check_status(url, await self._client.post(url, body))

    def _check_answer(self, url: str, answer: Answer) -> dict[str, Any]:
        self._check_status(url, answer)
        return answer.parse_json(url)

    def _check_status(self, url: str, answer: Answer) -> None:
        """Raise an error that says whether a retry may help, unless the request succeeded."""
        if answer.is_success:
            return
        status, message = answer.status, answer.error_message(self._key)
        returned = f"returned status {status} ({message})" if message else f"returned status {status}"
        # In an evaluation, the folder of the weights exists before the request: a failure to load it is final.
        load_failed = status == 500 and self.names and url.endswith(RELOAD_WEIGHTS)
        if (status in RETRYABLE_STATUS or status >= 500) and not load_failed:
            raise NoAnswer(returned)
        hint = ""
        if status == 401:
            hint = f"; is {self.folder / rendezvous.KEY} its key?"
        elif status == 404 and url.endswith((RELOAD_WEIGHTS, RESET_CACHE)):
            hint = "; does it have VLLM_SERVER_DEV_MODE=1 in its environment?"
        elif status == 404 and url.endswith(LOAD_ADAPTER):
            hint = (
                "; does it have VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment, and the option --enable-lora?"
            )
        raise _RequestRefused(f"{url} {returned}{hint}", status)


class WrongWeights(RunError):
    """A server has other weights than the required ones and cannot load the required ones."""


class _RequestRefused(RunError):
    """A server has refused a request, and a retry would not help."""

    def __init__(self, sentence: str, status: int):
        super().__init__(sentence, "config")
        self.status = status


async def _send_nothing(url: str) -> None: ...


async def _gather(work: list[Callable[[], Coroutine[Any, Any, T]]]) -> list[T]:
    """Run all coroutines concurrently; the first error cancels the others."""
    tasks = [asyncio.ensure_future(each()) for each in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def _model_cards(answer: dict[str, Any]) -> list[dict[str, Any]]:
    """The models that a server reports, without adapters."""
    data = answer.get("data")
    return [card for card in data if isinstance(card, dict) and not card.get("parent")] if type(data) is list else []


def _model_ids(answer: dict[str, Any]) -> list[str]:
    """Names of the models that a server reports, adapters included."""
    data = answer.get("data")
    return [str(card.get("id")) for card in data if isinstance(card, dict)] if type(data) is list else []


def _parse_next_tokens(url: str, answer: dict[str, Any], count: int) -> list[dict[int, float]]:
    """Read token id -> log-prob of the likely next tokens of each prompt.

    Raises:
        RunError: the answer has another form.
    """
    try:
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        tops = [choice["logprobs"]["top_logprobs"][0] for choice in choices]
        reported = [{int(name.removeprefix("token_id:")): float(logp) for name, logp in top.items()} for top in tops]
        assert len(reported) == count and all(reported)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, AssertionError):
        problem = "does not report the log-probs of likely tokens by token id; is it a vLLM server from 0.22?"
        raise RunError(f"{url} {problem}", "config") from None
    return reported
