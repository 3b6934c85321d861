"""Measures the memory that passes of a model would allocate, with fake tensors (torch's FakeTensorMode).

It traces a few layers and extrapolates to all layers.
"""

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, masking_utils

from aem_exp.rollout.sampling import base, local

WEIGHTS, GATHERED, ACTIVATIONS, GRADIENTS = "weights", "gathered", "activations", "gradients"
LOGITS, CACHE = "logits", "KV cache"
TILE: Final = (4096, 32768)  # tokens and vocabulary entries that TRL's head computes at a time
FORWARD_TILES, BACKWARD_TILES = 3, 7  # float32 copies of a tile in torch's implementation; the GPU kernel needs none
FSDP_LAYERS: Final = {
    True: 3,
    False: 2,
}  # gathered layers under FSDP2 (key: GPU): the current one, the buffer of the all-gather, and on a GPU the next one
TRACED_LAYERS: Final = 3
Bytes = dict[str, int]


class Meter(TorchDispatchMode):
    """Counts the bytes of all live tensors that are created while it is active, by kind.

    `peaks` holds the peak of each section of the pass.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kind = ACTIVATIONS  # of new tensors
        self.live: Counter[str] = Counter()
        self.peaks: list[Bytes] = [{}]
        self._known: dict[int, tuple[str, int]] = {}
        self._total = self._peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.count(leaf)
        return out

    def count(self, tensor: Tensor, kind: str | None = None) -> None:
        """Count a tensor from now on. With `kind`, move a counted tensor to that kind."""
        storage = tensor.untyped_storage()
        before = self._known.get(id(storage))
        if before is None:
            self._change(id(storage), kind or self.kind, storage.nbytes())
            weakref.finalize(storage, self._release, id(storage))
        elif kind:
            self._release(id(storage))
            self._change(id(storage), kind, before[1])

    def set_bytes(self, kind: str, size: int) -> None:
        """Count `size` bytes of a kind without a tensor; replaces the previous call."""
        if 0 in self._known:
            self._release(0)
        self._change(0, kind, size)

    def start_section(self) -> None:
        """Start a new section of the pass."""
        self.peaks.append(dict(self.live))
        self._peak = self._total

    def _change(self, key: int, kind: str, size: int) -> None:
        self._known[key] = (kind, size)
        self.live[kind] += size
        self._total += size
        if self._total > self._peak:
            self._peak, self.peaks[-1] = self._total, dict(self.live)

    def _release(self, key: int) -> None:
        kind, size = self._known.pop(key)
        self.live[kind] -= size
        self._total -= size


class MemoryTrace:
    """A policy of fake tensors; its methods return the memory that passes allocate in addition to the weights.

    Args:
        make: builds the policy.
        autocast: use bf16 mixed precision.
        gpu: use the kernels of a GPU, else those of a CPU.
        masks: attention gets a padding mask. The flash-attention library needs none.
        processes: number of processes that shard the weights and gather them layer by layer (FSDP2); 1: no sharding.
        offload: keep the shards of weights and gradients in host memory.
        checkpointing: recompute the activations of a layer in the backward pass.
        fp32_head: compute logits in float32.
    """

    def __init__(
        self,
        make: Callable[[], Any],
        *,
        autocast: bool = False,
        gpu: bool = False,
        masks: bool = True,
        processes: int = 1,
        offload: bool = False,
        checkpointing: bool = False,
        fp32_head: bool = False,
    ):
        self._fake = FakeTensorMode()
        self.autocast, self.gpu, self.masks, self.fp32_head = autocast, gpu, masks, fp32_head
        self.processes, self.offload = processes, offload
        with torch.device("meta"):
            policy = make()
        with self._fake:
            _materialize_fakes(policy)
        if checkpointing:
            policy.gradient_checkpointing_enable({"use_reentrant": False})
        self.parameters = list(policy.parameters())
        self._model = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
        self.config = self._model.config.get_text_config()
        self._base = getattr(self._model, self._model.base_model_prefix)
        self._parent, self._name = _find_layers(self._base)
        self._all_layers = getattr(self._parent, self._name)
        self._eager = self.config._attn_implementation == "eager"

    def update(self, rows: int, tokens: int, completion: int, again: bool = False) -> Bytes:
        """The peak of a forward and backward pass over a micro-batch. `again`: gradients of another micro-batch exist already."""

        def act(meter: Meter) -> None:
            left = [[p for p in layer.parameters() if p.requires_grad] for layer in self._active_layers]
            trained = [p for p in self._model.parameters() if p.requires_grad]
            on_gradient = partial(self._on_gradient, meter, left, again)
            hooks = [p.register_post_accumulate_grad_hook(on_gradient) for p in trained]
            if again and self.processes == 1:
                for p in trained:
                    p.grad = torch.empty_like(p)
                    meter.count(p.grad, GRADIENTS)
            self._shards = [self._shard(meter, p) for p in self.parameters if p.requires_grad and again]
            self._model.train()
            self._logps(meter, rows, tokens, completion).sum().backward()
            self._shards.clear()
            for hook in hooks:
                hook.remove()
            for p in trained:
                p.grad = None

        return self._peak(act)

    def score(self, rows: int, tokens: int, completion: int) -> Bytes:
        """The peak of a pass without gradients: log-probabilities and entropies of a micro-batch."""

        def act(meter: Meter) -> None:
            self._model.eval()
            with torch.no_grad():
                self._logps(meter, rows, tokens, completion)

        return self._peak(act)

    def play(self, episodes: int, tokens: int, prompt: int) -> Bytes:
        """The peak of sampling with a KV cache: the larger of reading the first prompts and decoding at full context."""
        begun = self._peak(lambda meter: self._append(meter, episodes, 0, prompt))
        full = self._peak(lambda meter: self._append(meter, episodes, tokens - 1, 1))
        return max(begun, full, key=lambda peak: sum(peak.values()))

    def _append(self, meter: Meter, episodes: int, past: int, new: int) -> None:
        self._model.eval()
        cache, ids = _CountedCache(meter), torch.zeros(episodes, new, dtype=torch.long)
        with torch.no_grad(), self._autocast():
            with _count_as(meter, LOGITS):  # logits of the first token, which a session keeps during the turn
                first = torch.empty(episodes, self.config.vocab_size)
            if past:
                self._base(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
                cache.fill(past)
            hidden = self._base(
                input_ids=ids,
                attention_mask=self._mask(episodes, new, past + new),
                position_ids=torch.zeros_like(ids),
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state[:, -1]
            with _count_as(meter, LOGITS):
                scores = self._model.get_output_embeddings()(hidden).float()
                local.sample_tokens(scores, torch.empty(episodes, dtype=torch.float64), base.SamplingParams())
            del first

    def _logps(self, meter: Meter, rows: int, tokens: int, completion: int) -> Tensor:
        ids = torch.zeros(rows, tokens, dtype=torch.long)
        mask = self._mask(rows, tokens, tokens) if rows > 1 else None  # a single row has no padding
        units = FSDP_LAYERS[self.gpu]
        self._gather_layers(meter, units, head=False)
        with self._autocast():
            hidden = self._base(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            self._gather_layers(meter, 1)
            weight = self._model.get_output_embeddings().weight
            scored = hidden[:, -completion - 1 : -1] if self.gpu else hidden[:, :-1]
            dtype = torch.bfloat16 if self.autocast else hidden.dtype
            if self.fp32_head:
                scored, dtype = scored.float(), torch.float32
            after = partial(self._gather_layers, meter, 2 * units)  # layers and their gradients
            return _FakeHead.apply(scored.reshape(-1, hidden.shape[-1]), weight, dtype, self.gpu, meter, after)

    def _mask(self, rows: int, queries: int, keys: int) -> Tensor | None:
        if not self.masks:
            return None
        mask = torch.ones(rows, 1, queries, keys, dtype=torch.bool)
        return mask.to(self.parameters[0].dtype) if self._eager else mask

    def _autocast(self) -> Any:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.autocast)

    def _on_gradient(self, meter: Meter, left: list[list[nn.Parameter]], again: bool, p: nn.Parameter) -> None:
        """Account for the gradient of a weight, which is now complete."""
        if self.processes > 1:
            p.grad = None  # reduce-scatter: each process keeps its shard
            if not again:
                self._shards.append(self._shard(meter, p))
        else:
            assert p.grad is not None
            meter.count(p.grad, GRADIENTS)
        for waiting in left:
            if any(p is other for other in waiting):
                waiting[:] = [other for other in waiting if other is not p]
                if not waiting:
                    meter.start_section()

    def _shard(self, meter: Meter, p: nn.Parameter) -> Tensor:
        """The shard of a gradient that this process keeps."""
        size = 0 if self.offload or self.processes == 1 else -(-p.numel() // self.processes)
        with _count_as(meter, GRADIENTS):
            return torch.empty(size, dtype=torch.float32 if self.autocast else p.dtype)

    def _gather_layers(self, meter: Meter, layers: int, head: bool = True) -> None:
        """Count `layers` gathered layers and, optionally, the gathered head."""
        if self.processes > 1:
            words = self._model.get_output_embeddings().weight.numel() if head else 0
            largest = max(sum(p.numel() for p in layer.parameters()) for layer in self._all_layers)
            meter.set_bytes(GATHERED, self.parameters[0].element_size() * (layers * largest + words))

    # Extrapolation from a few layers.

    def _peak(self, act: Callable[[Meter], None]) -> Bytes:
        """The peak of a pass through all layers."""
        count = len(self._all_layers)
        if count <= TRACED_LAYERS + 2 or not self._has_equal_layers():
            return max(self._trace_layers(act, count), key=lambda peak: sum(peak.values()))
        few, more = (self._trace_layers(act, n) for n in (TRACED_LAYERS - 1, TRACED_LAYERS))
        ends = range(min(2, len(few))), range(-min(2, len(few)), 0)  # the sizes of the other sections lie between these
        longer = [
            {k: more[i].get(k, 0) + (count - TRACED_LAYERS) * (more[i].get(k, 0) - few[i].get(k, 0)) for k in more[i]}
            for i in {i % len(few) - (len(few) if j else 0) for j, end in enumerate(ends) for i in end}
        ]
        return max(longer, key=lambda peak: sum(peak.values()))

    def _trace_layers(self, act: Callable[[Meter], None], count: int) -> list[Bytes]:
        self._active_layers = self._all_layers[:count]
        setattr(self._parent, self._name, nn.ModuleList(self._active_layers))
        try:
            with self._fake, _replace_kernels(self.gpu), Meter() as meter:
                for tensor in (*self.parameters, *self._model.buffers()):
                    meter.count(tensor, WEIGHTS)
                act(meter)
        finally:
            setattr(self._parent, self._name, self._all_layers)
        return [{kind: size for kind, size in peak.items() if kind != WEIGHTS} for peak in meter.peaks]

    def _has_equal_layers(self) -> bool:
        sizes = {tuple((p.shape, p.requires_grad) for p in layer.parameters()) for layer in self._all_layers}
        return len(sizes) == 1 and len(set(getattr(self.config, "layer_types", None) or [""])) == 1


class _CountedCache(DynamicCache):
    """A KV cache whose tensors are counted as `CACHE`."""

    def __init__(self, meter: Meter):
        super().__init__()
        self._meter = meter

    def update(self, *args: Any, **kwargs: Any) -> Any:
        with _count_as(self._meter, CACHE):
            return super().update(*args, **kwargs)

    def fill(self, tokens: int) -> None:
        """Resize the cache to this number of tokens."""
        with _count_as(self._meter, CACHE):
            for layer in self.layers:
                layer.keys, layer.values = (
                    kept.new_empty(*kept.shape[:2], tokens, kept.shape[3]) for kept in (layer.keys, layer.values)
                )


class _FakeHead(torch.autograd.Function):
    """Allocates what TRL's `ChunkedLogProbFunction` allocates: one tile of logits at a time, and float32 gradients."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, dtype: torch.dtype, gpu: bool, meter: Meter, after: Callable[[], None]
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.rest = dtype, gpu, meter, after
        with _count_as(meter, LOGITS):
            _allocate_tile(hidden, weight, dtype, 0 if gpu else FORWARD_TILES)
            return hidden.new_empty(10, len(hidden), dtype=torch.float32)[0]

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[Any, ...]:
        (hidden, weight), (dtype, gpu, meter, after) = ctx.saved_tensors, ctx.rest
        with _count_as(meter, LOGITS):
            hidden_grad = torch.empty_like(hidden, dtype=torch.float32)
            trained = ctx.needs_input_grad[1]
            weight_grad = torch.empty_like(weight, dtype=torch.float32) if trained else None
            _allocate_tile(hidden, weight, dtype, 0 if gpu else BACKWARD_TILES)
            grads = hidden_grad.to(hidden.dtype), None if weight_grad is None else weight_grad.to(weight.dtype)
        after()
        return (*grads, None, None, None, None)


def _allocate_tile(hidden: Tensor, weight: Tensor, dtype: torch.dtype, copies: int) -> None:
    """Allocate a tile and free it; the next tile reuses its memory."""
    tokens, words = min(len(hidden), TILE[0]), min(len(weight), TILE[1])
    made = [hidden.new_empty(tokens, TILE[1], dtype=dtype), hidden[:tokens].to(dtype), weight[:words].to(dtype)]
    made += [hidden.new_empty(tokens, words, dtype=torch.float32) for _ in range(copies)]


@contextlib.contextmanager
def _count_as(meter: Meter, kind: str) -> Iterator[None]:
    before, meter.kind = meter.kind, kind
    try:
        yield
    finally:
        meter.kind = before


@contextlib.contextmanager
def _replace_kernels(gpu: bool) -> Iterator[None]:
    """Replace attention by a GPU-like version that never stores the scores, and skip the search for packed sequences."""
    attention, search = functional.scaled_dot_product_attention, masking_utils.find_packed_sequence_indices
    if gpu:
        functional.scaled_dot_product_attention = _fake_attention  # type: ignore[assignment]
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        functional.scaled_dot_product_attention, masking_utils.find_packed_sequence_indices = attention, search


def _fake_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (x.to(torch.bfloat16) for x in (query, key, value))
    return _FakeAttention.apply(query, key, value, attn_mask)


class _FakeAttention(torch.autograd.Function):
    """Allocates what torch's flash attention allocates, or, with a mask, its memory-efficient attention."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        bias = None if mask is None else mask.to(query.dtype)
        out, sums = torch.empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, bias, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value = ctx.saved_tensors[:3]
        summed = torch.empty_like(query, dtype=torch.float32)
        shared = [torch.empty_like(query) for _ in (key, value)] if key.shape != query.shape else []
        grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None
        del summed, shared
        return grads


def _materialize_fakes(model: nn.Module) -> None:
    """Replace meta tensors by fake CPU tensors. Shared tensors stay shared."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None and id(tensor) not in made:
                    new = torch.empty(tensor.shape, dtype=tensor.dtype)
                    learns = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if learns else new
                if tensor is not None:
                    held[name] = made[id(tensor)]


def _find_layers(base: nn.Module) -> tuple[nn.Module, str]:
    """The owner and the attribute name of the longest module list, which holds the layers."""
    lists = [
        (len(child), parent, name)
        for parent in base.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.ModuleList)
    ]
    _, parent, name = max(lists, key=lambda found: found[0])
    return parent, name
