"""The weights that a run's vLLM servers must have: how one server gets them, and the checks that it has them."""

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from aem_exp.core.errors import RunError
from aem_exp.rollout.sampling.http import sanitize
from aem_exp.rollout.sampling.vllm_api import (
    COMPLETIONS,
    Api,
    LoadFailed,
    RequestRefused,
    context_limit,
    without_adapters,
)

if TYPE_CHECKING:
    from aem_exp.rollout.sampling.agreement import Agreement  # imports torch, which the first checks do not need

log = logging.getLogger("aem_exp")
SHOWN_CHARACTERS: Final = 100  # characters of a server's model name in messages


class WrongWeights(RunError):
    """A server has other weights than the required ones and cannot load the required ones."""


@dataclass
class ServedWeights:
    """The newest weights of a run, or the weights to evaluate."""

    api: Api
    """Sends the requests."""
    folder: Path | None = None
    """The newest weights, if they are files; a restarted server loads them."""
    adapter: str = ""
    """Name of the newest LoRA adapter, if `folder` is the folder of an adapter."""
    old_adapter: str = ""
    """Name of the adapter before the newest one."""
    streamed: bool = False
    """The newest weights were sent from GPU to GPU; a restarted server has lost them."""
    agreement: "Agreement | None" = None
    """Compares each server with the trainer after an update."""
    context: int = 0
    """Number of tokens that a server must accept; 0: not checked."""
    names: Sequence[str] = ()
    """In evaluation: names of these weights, as a server may report them (see `policy.weight_names`)."""

    def replace(self, folder: Path | None, adapter: str) -> None:
        """Set the newest weights: the files in a folder, or those that were streamed (None)."""
        self.folder, self.streamed = folder, folder is None
        self.old_adapter, self.adapter = self.adapter, adapter

    async def send(self, url: str) -> None:
        """Make a server load the newest weights, if there are any, and check it.

        Raises:
            WrongWeights: it has other weights and cannot load these.
            WeightsDiffer: its log-probs differ from those of the trainer.
            RunError: it accepts fewer tokens than `context`, or has lost streamed weights.
        """
        if self.streamed:
            lost = "was restarted and has lost its weights (launch.server_weights=nccl sends them between steps only)"
            raise RunError(f"{url} {lost}; start the run again to resume from its newest checkpoint", "node")
        cards = await self.api.list_models(url) if self.context or self.names or self.adapter else []
        if self.context:
            self._check_context(url, cards)
        if self.folder is None:
            return
        if self.names:
            await self._require(url, self.folder, cards)
        elif self.adapter:
            await self._load_adapter(url, self.folder, cards)
        else:
            await self.api.reload_weights(url, self.folder)
        await self._compare(url)

    async def check(self, url: str) -> None:
        """Check a server that has the newest weights already.

        Raises:
            WeightsDiffer: its log-probs differ from those of the trainer.
            RunError: it accepts fewer tokens than `context`.
        """
        if self.context:
            self._check_context(url, await self.api.list_models(url))
        await self._compare(url)

    def request(self, body: dict[str, Any]) -> dict[str, Any]:
        """A completions request that is answered with these weights."""
        return body | {"model": self.adapter} if self.adapter else body

    def _check_context(self, url: str, cards: list[dict[str, Any]]) -> None:
        """Refuse a server that accepts fewer tokens than episodes may have."""
        longest = context_limit(cards)
        if longest is not None and longest < self.context:
            mismatch = f"accepts at most {longest:,} tokens, fewer than env.context_tokens={self.context}"
            raise RunError(f"{url} {mismatch}; start it with --max-model-len {self.context}", "config")

    async def _load_adapter(self, url: str, folder: Path, cards: list[dict[str, Any]]) -> None:
        """Make a server load the newest LoRA adapter and drop the one before it. The prefix cache knows adapters by name."""
        if self.adapter not in [str(card.get("id")) for card in cards]:
            await self.api.load_adapter(url, self.adapter, folder)
        if self.old_adapter:
            with suppress(RequestRefused):  # a restarted server never had it
                await self.api.unload_adapter(url, self.old_adapter)

    async def _require(self, url: str, folder: Path, cards: list[dict[str, Any]]) -> None:
        """Make sure that a server has the required weights: it loads them, or was started with them and cannot load any."""
        try:
            await self.api.reload_weights(url, folder)
        except LoadFailed as error:
            # The folder was complete before the request, so another attempt would fail too.
            raise WrongWeights(f"{url} {error}; it cannot load {folder}", "config") from None
        except RequestRefused as refused:
            if refused.status != 404:
                raise WrongWeights(f"{refused}; it cannot load {folder}", "config") from None
            roots = [sanitize(str(card.get("root") or card.get("id"))) for card in without_adapters(cards)]
            self._check_started_with(url, folder, roots)

    def _check_started_with(self, url: str, folder: Path, roots: list[str]) -> None:
        """Refuse a server whose model card names other weights; warn if it does not name the revision."""
        names = {*roots, *(str(Path(root).resolve()) for root in roots if root.startswith("/"))}
        if not names & set(self.names):
            models = ", ".join(root[:SHOWN_CHARACTERS] for root in roots[:9]) or "no model"
            remedy = f"start it with {folder}, or with VLLM_SERVER_DEV_MODE=1 in its environment"
            raise WrongWeights(f"{url} serves {models} and cannot load other weights; {remedy}", "config")
        if not any(name.startswith("/") for name in names & set(self.names)):
            warning = "%s serves %s but does not report its revision; the expected weights are %s"
            log.warning(warning, url, roots[0][:SHOWN_CHARACTERS], folder)

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
        answer = await self.api.post(url, COMPLETIONS, self.request(body))
        self.agreement.compare(url, _parse_next_tokens(url, answer, len(self.agreement.prompts)))


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
