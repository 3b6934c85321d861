"""The requests that a vLLM server understands, and what a failed one means: another attempt, or an error for the user."""

from pathlib import Path
from typing import Any, Final

from aem_exp.cluster import rendezvous
from aem_exp.core.errors import RunError
from aem_exp.rollout.sampling.http import Answer, Client, NoAnswer

MODELS: Final = "/v1/models"
COMPLETIONS: Final = "/v1/completions"
# Endpoints that vLLM has only with VLLM_SERVER_DEV_MODE=1 in its environment.
RELOAD_WEIGHTS, RESET_CACHE = "/collective_rpc", "/reset_prefix_cache"
# Endpoints that vLLM has only with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment.
LOAD_ADAPTER, UNLOAD_ADAPTER = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
RETRYABLE_STATUS: Final = (408, 409, 425, 429)  # the 4xx statuses that may succeed later


def without_adapters(cards: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The cards of models that are no LoRA adapters."""
    return [card for card in cards if not card.get("parent")]


def context_limit(cards: list[dict[str, Any]]) -> int | None:
    """Largest number of tokens that a server with these cards accepts; None if it does not report one."""
    limits = [card.get("max_model_len") for card in without_adapters(cards)]
    return min((limit for limit in limits if type(limit) is int and limit > 0), default=None)


class RequestRefused(RunError):
    """A server has refused a request, and another attempt would not help."""

    def __init__(self, sentence: str, status: int):
        super().__init__(sentence, "config")
        self.status = status


class LoadFailed(NoAnswer):
    """A server could not load weights. Another attempt helps only if its node did not see the file yet."""


class Api:
    """Sends requests to vLLM servers, each of which is named by its URL.

    All methods raise `NoAnswer` if another attempt may help, and `RequestRefused` otherwise.

    Args:
        folder: contains the servers' API key, named in errors.
        key: the API key; "" if the servers have none.
        seconds: limit of the time for one answer.
    """

    def __init__(self, folder: Path, key: str, seconds: float):
        self._folder, self._key = folder, key
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = Client(self.headers, seconds)

    async def close(self) -> None:
        await self._client.close()

    async def post(self, url: str, path: str, body: dict[str, Any], *max_bytes: int) -> dict[str, Any]:
        """Send a body and return the answer, a JSON object of at most `max_bytes` bytes."""
        answer = await self._client.post(url + path, body, *max_bytes)
        self._check_status(url + path, answer)
        return answer.parse_json(url + path)

    async def list_models(self, url: str) -> list[dict[str, Any]]:
        """The cards of all models and adapters of a server."""
        answer = await self._client.get(url + MODELS)
        self._check_status(url + MODELS, answer)
        data = answer.parse_json(url + MODELS).get("data")
        return [card for card in data if isinstance(card, dict)] if type(data) is list else []

    async def reload_weights(self, url: str, folder: Path) -> None:
        """Make a server load the weights in a folder and clear its prefix cache.

        Raises:
            LoadFailed: the server reports an error.
        """
        try:
            await self.post(url, RELOAD_WEIGHTS, {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}})
        except NoAnswer as error:
            raise (LoadFailed(str(error)) if error.status == 500 else error) from error
        await self.post(url, RESET_CACHE, {})

    async def loads_adapters(self, url: str) -> bool:
        """Whether a server can load LoRA adapters: an empty request to load one is then invalid, not unknown."""
        answer = await self._client.post(url + LOAD_ADAPTER, {"lora_name": "", "lora_path": ""})
        return answer.status != 404

    async def load_adapter(self, url: str, name: str, folder: Path) -> None:
        await self._command(url + LOAD_ADAPTER, {"lora_name": name, "lora_path": str(folder)})

    async def unload_adapter(self, url: str, name: str) -> None:
        await self._command(url + UNLOAD_ADAPTER, {"lora_name": name})

    async def _command(self, url: str, body: dict[str, Any]) -> None:
        """Send a request whose answer is only a status; its text need not be JSON."""
        self._check_status(url, await self._client.post(url, body))

    def _check_status(self, url: str, answer: Answer) -> None:
        if answer.is_success:
            return
        status, message = answer.status, answer.error_message(self._key)
        returned = f"returned status {status} ({message})" if message else f"returned status {status}"
        if status in RETRYABLE_STATUS or status >= 500:
            raise NoAnswer(returned, status=status)
        raise RequestRefused(f"{url} {returned}{self._hint(url, status)}", status)

    def _hint(self, url: str, status: int) -> str:
        """The rest of an error's sentence: what its cause may be."""
        if status == 401:
            return f"; is {self._folder / rendezvous.KEY} its key?"
        if status == 404 and url.endswith((RELOAD_WEIGHTS, RESET_CACHE)):
            return "; does it have VLLM_SERVER_DEV_MODE=1 in its environment?"
        if status == 404 and url.endswith(LOAD_ADAPTER):
            variable = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment"
            return f"; does it have {variable}, and the option --enable-lora?"
        return ""
