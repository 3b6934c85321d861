"""Proves that the engines that generate have the weights of the trainer, before a step trains on their responses.

After every push of weights, each engine and the trainer score the same fixed prompts (`rollout.sampling.agreement`). Before the
first step, a probe changes everything that the run trains, pushes it, compares, and pushes the true weights again. An engine that
keeps some old weights shows in the probe, and in no other test: before training, old and new weights are equal.
"""

import logging
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from hashlib import blake2b
from typing import Any, Final

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from aem_exp.core.console import NOTE
from aem_exp.core.errors import RunError
from aem_exp.rollout.sampling.agreement import (
    EXACT_GAP,
    FIRST_GAP,
    Agreement,
    Gap,
    WeightsDiffer,
    next_token_logps,
    worst_gap,
)
from aem_exp.rollout.sampling.weight_sync import Publisher

log = logging.getLogger("aem_exp")
GAP_FACTOR: Final = 5.0  # limit of later gaps in other data types, as a multiple of the first gap
NOISE: Final = 0.1  # of the probe: standard deviation relative to the root mean square of a tensor
ZERO_NOISE: Final = 0.02  # the same for a tensor of zeros, such as the second matrix of a new LoRA adapter
TIED_HEAD: Final = "head, tied to the embedding"

# The first pattern in the name of a parameter decides its group.
_GROUPS: Final = (
    ("norms", r"norm|\bln_"),
    ("head", r"lm_head|embed_out"),
    ("embedding", r"embed|\bwte\b|\bwpe\b"),
    ("attention", r"attn|attention"),
    ("MLP", r"mlp|feed_forward|ffn|experts"),
)


class CheckedPublisher:
    """Pushes the weights of a trainer to engines and checks that they use them.

    Args:
        publisher: pushes the weights.
        agreement: the fixed prompts, and the gaps of the engines.
        exact: trainer and engines compute in float32.
    """

    def __init__(self, publisher: Publisher, agreement: Agreement, *, exact: bool):
        self.publisher, self.agreement, self.exact = publisher, agreement, exact
        self._limit = math.inf

    def __call__(self, trainer: Any) -> dict[str, float]:
        """Push the newest weights; return the largest gap over all engines as metrics. The first call runs the probe.

        Raises:
            WeightsDiffer: an engine has other weights than the trainer, on every process of the run.
        """
        gap = self._push(trainer) if math.isfinite(self._limit) else self._probe(trainer)
        if not gap.mean <= self._limit:
            cause = self._find_cause(trainer, gap)
            raise WeightsDiffer(self._worst_engine(), gap, self._limit, cause)
        self.agreement.limit = self._limit  # for servers that restart before the next push
        return {"train/agreement_mean": gap.mean, "train/agreement_max": gap.maximum}

    def _push(self, trainer: Any) -> Gap:
        """Push the current weights and return the largest gap over the engines of all processes."""
        self.agreement.limit = math.inf
        self.agreement.expect(next_token_logps(trainer.model, self.agreement.prompts, trainer.accelerator.device))
        _reshard(trainer.model)
        self.publisher(trainer, self.agreement)
        gap = worst_gap(gather_object(list(self.agreement.gaps.values())))
        if gap is None:
            raise RunError("no server has loaded the weights", "node")
        return gap

    def _probe(self, trainer: Any) -> Gap:
        """Push changed weights and the true weights, and derive the limit of all later gaps; return the gap of the true weights.

        Raises:
            WeightsDiffer: an engine kept old weights.
        """
        changed = self._push_changed(trainer, _list_trained(trainer))
        true = self._push(trainer)
        self._limit = EXACT_GAP if self.exact else max(EXACT_GAP, GAP_FACTOR * true.mean)
        if not true.mean <= (EXACT_GAP if self.exact else FIRST_GAP):
            limit = EXACT_GAP if self.exact else FIRST_GAP
            raise WeightsDiffer(self._worst_engine(), true, limit, self._find_cause(trainer, true))
        if not changed.mean <= self._limit:
            raise WeightsDiffer(self._worst_engine(), changed, self._limit, self._find_cause(trainer, true))
        log.log(NOTE, "engines agree with the trainer: %.1e nats on average after a test update", changed.mean)
        return true

    def _push_changed(self, trainer: Any, tensors: Mapping[str, Tensor]) -> Gap:
        """Push with noise on these tensors; return the gap. The trainer has its own weights again after this.

        If this is interrupted, the engines get the true weights first.
        """
        try:
            with add_noise(trainer.model, tensors):
                return self._push(trainer)
        except RunError:
            raise
        except BaseException:
            if trainer.accelerator.num_processes == 1:
                with suppress(RunError):
                    self._push(trainer)
            raise

    def _find_cause(self, trainer: Any, true: Gap) -> str:
        """Change one group of tensors at a time, and name the groups whose changes an engine does not use."""
        if not true.mean <= FIRST_GAP:
            return "it ignores the updates, or it was started with other weights than this run"
        limit = GAP_FACTOR * max(true.mean, EXACT_GAP / GAP_FACTOR)
        gaps = {
            group: self._push_changed(trainer, tensors).mean
            for group, tensors in group_tensors(trainer, self.agreement.prompts).items()
        }
        self._push(trainer)
        old = {group: f"{group} ({gap:.2g} nats)" for group, gap in gaps.items() if not gap <= limit}
        if TIED_HEAD in old:
            old.pop("embedding")  # its changes are missing in the head, too
        if old:
            return f"after an update, it keeps old weights of the {', '.join(old.values())}; its log may say why"
        return "it uses all updates, but probably computes in another data type than the trainer"

    def _worst_engine(self) -> str:
        gaps = self.agreement.gaps
        return max(gaps, key=lambda engine: gaps[engine].mean) if gaps else "an engine"


def _list_trained(trainer: Any) -> dict[str, Tensor]:
    """Name -> tensor of everything that the run trains."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@contextmanager
def add_noise(model: Any, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Add noise to tensors of the model in place. At the end they have exactly their old values."""
    with torch.no_grad():
        saved = {name: _local(tensor).to("cpu", copy=True) for name, tensor in tensors.items()}
        try:
            for name, tensor in tensors.items():
                _local(tensor).add_(_draw_noise(name, saved[name]).to(tensor.device))
            _reshard(model)
            yield
        finally:
            for name, tensor in tensors.items():
                _local(tensor).copy_(saved[name])
            _reshard(model)


def group_tensors(trainer: Any, prompts: list[list[int]]) -> dict[str, dict[str, Tensor]]:
    """Group -> the tensors of it that the run trains: embedding, head, attention, MLP, norms, each also of a LoRA adapter.

    A head that is tied to the embedding is represented by the rows below all token ids of the prompts: changes of these rows have
    an effect through the head only.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    is_tied = head is not None and head.weight is embedding.weight
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in _list_trained(trainer).items():
        kind = next((label for label, pattern in _GROUPS if re.search(pattern, name)), "other layers")
        if is_tied and tensor is embedding.weight and not hasattr(tensor, "to_local"):
            groups[TIED_HEAD] = {name: tensor[: min(map(min, prompts))]}
        groups.setdefault(f"LoRA adapter of the {kind}" if "lora_" in name else kind, {})[name] = tensor
    return groups


def _local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process has."""
    return tensor.detach().to_local() if hasattr(tensor, "to_local") else tensor.detach()


def _reshard(model: Any) -> None:
    """Drop the gathered copies of sharded weights that a forward pass has left."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _draw_noise(name: str, value: Tensor) -> Tensor:
    """Noise for a tensor, the same in all processes that have the same values of it."""
    seed = int.from_bytes(blake2b(name.encode(), digest_size=4).digest())
    scale = value.float().square().mean().sqrt().item() if value.numel() else 0.0
    noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(seed)) * (NOISE * scale or ZERO_NOISE)
    return noise.to(value.dtype)
