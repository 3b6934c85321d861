"""Checks the servers of `launch.servers` before any work: one answers, and all that answer serve what the run needs."""

import asyncio
import json
from pathlib import Path
from typing import Any, Final

from aem_exp import config
from aem_exp.cluster import rendezvous
from aem_exp.config import ConfigError, Experiment
from aem_exp.rollout.sampling.http import NoAnswer, is_healthy
from aem_exp.rollout.sampling.vllm_api import Api, RequestRefused, context_limit, without_adapters

# Keys of a model's config.json. Two models whose values differ cannot exchange weights.
SHAPE: Final = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")


def require_suitable(experiment: Experiment, weights: str) -> None:
    """Refuse servers that this run could not use.

    Args:
        weights: folder of the weights of the model; it need not exist yet.

    Raises:
        ConfigError: no server answers; or one of them has another model or too short a context, refuses the API key, or cannot
            load adapters although the run sends them.
    """
    folder = str(experiment.launch.servers)
    urls, key = rendezvous.read_urls(Path(folder))
    healthy = [url for url in urls if is_healthy(url)]
    if not healthy:
        problem = f"no server answers at {', '.join(urls[:3])}"
        remedy = "start one with python -m aem_exp.serve, and wait until it serves"
        raise ConfigError("launch.servers", folder, f"{problem}; {remedy}")
    for url in healthy:
        try:
            problem = asyncio.run(_find_problem(experiment, weights, url, key))
        except RequestRefused as refused:
            raise ConfigError("launch.servers", folder, str(refused)) from None
        except NoAnswer:  # the run will try again
            continue
        if problem:
            remedy = "start it with the settings of this run: python -m aem_exp.serve OVERRIDES"
            raise ConfigError("launch.servers", folder, f"the server at {url} {problem}; {remedy}")


async def _find_problem(experiment: Experiment, weights: str, url: str, key: str) -> str:
    """Why this run cannot use a server, as the rest of a sentence; "" if it can."""
    api = Api(Path(str(experiment.launch.servers)), key, experiment.launch.server_seconds)
    try:
        cards = await api.list_models(url)
        context, limit = config.max_context(experiment), context_limit(cards)
        if limit is not None and limit < context:
            return f"accepts at most {limit:,} tokens, but this run needs {context:,} (env.context_tokens)"
        for card in without_adapters(cards):
            served, needed = _read_shape(str(card.get("root"))), _read_shape(weights)
            if served and needed and served != needed:
                return f"serves another model, {Path(str(card['root'])).name} instead of {experiment.model.name}"
        if experiment.launch.server_weights == "adapter" and not await api.loads_adapters(url):
            return "was started without LoRA adapters, but launch.server_weights=adapter needs them"
        return ""
    finally:
        await api.close()


def _read_shape(folder: str) -> dict[str, Any]:
    """The shape of the model in a folder; empty if the folder is not on this machine."""
    try:
        content = json.loads((Path(folder) / "config.json").read_text())
        return {key: content.get(key) for key in SHAPE}
    except (OSError, ValueError, AttributeError):
        return {}
