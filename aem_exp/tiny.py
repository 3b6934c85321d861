"""Makes a tiny policy for tests and examples: a word-level tokenizer, a small Qwen3, and a warm start that imitates the
world's scripted player.
"""

import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from random import Random
from typing import Final, Protocol

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from aem_exp.config import Env
from aem_exp.core.errors import ConfigError, RunError
from aem_exp.envs import TextEnv, World
from aem_exp.envs.executor import SerialExecutor
from aem_exp.rollout.chat import Chat
from aem_exp.rollout.play import Rollout
from aem_exp.rollout.rows import Row, build_rows
from aem_exp.rollout.sampling.base import Sample
from aem_exp.rollout.types import Ending, Episode, Trajectory

log = logging.getLogger("aem_exp")
PAD: Final = "<pad>"
UNKNOWN: Final = "<unk>"
END: Final = "<|im_end|>"
HEADERS: Final = ("<|im_start|>system", "<|im_start|>user", "<|im_start|>assistant")  # one token each: shorter rows

# ChatML. Later turns only append, so the tokens of a conversation are a prefix of the tokens of a longer one; line
# breaks are white space, which this tokenizer drops.
CHAT_TEMPLATE: Final = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_TOKEN: Final = r"</?[a-z]+>|\d+|[^\W\d_]+|[^\w\s]|_"  # a tag, a number, a word, a sign
CHECKED_TEXTS: Final = 256  # demonstrations, and responses, whose words are looked up
_TEMPLATE_FIELD: Final = r"\{\w*\}"  # of a prompt template


class Teachable(World, Protocol):
    """A world with a vocabulary and a scripted player."""

    def words(self) -> Iterable[str]: ...

    def expert(self, env: TextEnv, random: Random, noise: float = 0.0, shyness: float = 0.0) -> str: ...


def make(
    world: Teachable,
    env: Env,
    folder: Path,
    *,
    hidden_size: int = 64,
    layers: int = 2,
    heads: int = 4,
    initializer_range: float = 0.1,
    episodes: int = 2048,
    noise: float = 0.05,
    shyness: float = 0.9,
    steps: int = 280,
    habit_steps: int = 60,
    batch: int = 32,
    learning_rate: float = 8e-3,
    seed: int = 0,
) -> None:
    """Make a policy that plays `world` a little, and write it to `folder` in Hugging Face format.

    First it imitates a bold player, and so comes by the skill; then, for a while, a shy one, and so comes by a habit that
    mostly keeps it from winning. The skill is there to be found again, and no lower temperature finds it.

    Args:
        env: how episodes become tokens; the warm start sees exactly what a rollout shows.
        hidden_size: width of the model.
        layers: number of layers.
        heads: attention heads of a layer.
        initializer_range: standard deviation of the random weights; with the usual 0.02 a model this small hardly learns.
        episodes: demonstrations to play, on training tasks.
        noise: share of the demonstrator's turns that are random.
        shyness: how often the shy player shuns what it ought to do; what that is, the world says.
        steps: updates that imitate the bold player.
        habit_steps: updates that imitate the shy player, after those.
        batch: demonstrations per update.
        learning_rate: highest learning rate; it rises for a tenth of the steps, then falls to zero.
        seed: seed of the weights and of all draws.
    """
    if not (hasattr(world, "words") and hasattr(world, "expert")):
        remedy = "choose a world that has a scripted player, or load a policy with model.path"
        raise ConfigError("model.make", f"{__name__}.make", remedy=remedy)
    if isinstance(world.words(), str):
        raise ConfigError("env.make", type(world).__name__, remedy="its words() must list words, and returns one text")
    if episodes < 1:
        raise ConfigError("model.make.episodes", episodes, remedy="the warm start needs at least 1 episode to imitate")
    tokenizer = make_tokenizer(world.words(), env)
    with _isolated_torch(seed):
        model = make_policy(tokenizer, env, hidden_size, layers, heads, initializer_range)
        random = Random(seed)
        skill = demonstrate(world, env, tokenizer, episodes, noise, 0.0, random)
        habit = demonstrate(world, env, tokenizer, max(1, episodes // 4), noise, shyness, random)
        batches = [*_batches(skill, steps, batch, random), *_batches(habit, habit_steps, batch, random)]
        imitate(model, batches, learning_rate)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_tokenizer(words: Iterable[str], env: Env) -> PreTrainedTokenizerFast:
    """One token per word, sign and number; a fixed wording of several words is one token too.

    Whatever is not in the vocabulary becomes `<unk>`. Decoding joins tokens by spaces.
    """
    lexicon = list(dict.fromkeys(words))
    phrases = sorted((text for text in lexicon if len(re.findall(_TOKEN, text)) > 1), key=len, reverse=True)
    prompt = " ".join(re.sub(_TEMPLATE_FIELD, " ", template) for template in env.prompt.values())
    numbers = [str(n) for n in range(env.max_turns + 1)]
    vocabulary = [
        *(PAD, UNKNOWN, END),
        *HEADERS,
        *lexicon,
        *re.findall(_TOKEN, prompt),
        *numbers,
    ]
    ids = {token: i for i, token in enumerate(dict.fromkeys(vocabulary))}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    whole = [
        re.escape(text) + (r"(?!\w)" if text[-1].isalnum() else "") for text in phrases
    ]  # not the begin of a longer word
    pattern = Regex("|".join([*whole, _TOKEN]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern, behavior="removed", invert=True)  # keep only what matches
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        additional_special_tokens=list(HEADERS),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=env.context_tokens,
    )


def make_policy(
    tokenizer: PreTrainedTokenizerFast, env: Env, hidden_size: int, layers: int, heads: int, initializer_range: float
) -> Qwen3ForCausalLM:
    """A Qwen3 with random weights."""
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=hidden_size // heads,
        max_position_embeddings=env.context_tokens,
        tie_word_embeddings=True,
        initializer_range=initializer_range,
        bos_token_id=None,
        **ends,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(**ends)
    for name, weight in model.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            torch.nn.init.constant_(weight, 1.5)  # heads this small cannot attend sharply with 1: normed keys are short
    return model


class _ScriptedSampler:
    """The scripted player as a sampler: it reads the state of the environments and responds in tokens."""

    def __init__(
        self,
        world: Teachable,
        executor: SerialExecutor,
        tokenizer: PreTrainedTokenizerFast,
        random: Random,
        noise: float,
        shyness: float,
    ) -> None:
        self.world, self.executor, self.tokenizer, self.random = world, executor, tokenizer, random
        self.noise, self.shyness = noise, shyness
        self.responses: dict[str, None] = {}  # the first responses that differ, in order

    def session(self) -> "_ScriptedSampler":
        return self

    def generate(self, slots: Sequence[int], *_: object) -> list[Sample]:
        envs = [self.executor.envs[slot] for slot in slots]
        responses = [self.world.expert(env, self.random, self.noise, self.shyness) for env in envs]
        if len(self.responses) < CHECKED_TEXTS:
            self.responses |= dict.fromkeys(responses)
        encoded = self.tokenizer(responses, add_special_tokens=False)["input_ids"]
        ended = [[*ids, self.tokenizer.eos_token_id] for ids in encoded]
        return [
            Sample(ids, [0.0] * len(ids), [0.0] * len(ids)) for ids in ended
        ]  # a script has no log-probs; none is read


def demonstrate(
    world: Teachable,
    env: Env,
    tokenizer: PreTrainedTokenizerFast,
    episodes: int,
    noise: float,
    shyness: float,
    random: Random,
) -> list[Row]:
    """Episodes of the scripted player as rows, played and rendered by the very code that rolls out a policy."""
    executor = SerialExecutor(world, getattr(world, "rehearse", world.env))
    sampler = _ScriptedSampler(world, executor, tokenizer, random, noise, shyness)
    tasks = world.tasks("train")
    episodes_to_play = [Episode(tasks[i % len(tasks)], i, 0, ()) for i in range(episodes)]
    with closing(executor):
        played = Rollout(executor, env, Chat(tokenizer)).play(episodes_to_play, sampler)
    whole = [t for t in played if t.responses and t.ended != Ending.CRASHED]
    _report_crashes(played, whole)
    if not shyness:  # the shy player uses the same words
        observations = [r.observation for t in whole[:CHECKED_TEXTS] for r in t.responses]
        _warn_unknown_words(tokenizer, list(sampler.responses), observations)
    return build_rows(whole, env.history)


def _report_crashes(played: Sequence[Trajectory], whole: Sequence[Trajectory]) -> None:
    """Warn of demonstrations that crashed, with the reason of the first.

    Raises:
        RunError: all of them crashed.
    """
    crashed = next((t for t in played if t.ended == Ending.CRASHED), None)
    if not whole:
        first = crashed or played[0]
        remedy = "its first prompt does not fit into env.context_tokens"
        reason = f"no episode of the scripted player could be played; task {first.task.id}: {first.error or remedy}"
        raise RunError(reason, "env")
    if crashed:
        warning = "%d of %d episodes of the scripted player crashed and are not imitated; task %s: %s"
        log.warning(warning, len(played) - len(whole), len(played), crashed.task.id, crashed.error)


def _warn_unknown_words(
    tokenizer: PreTrainedTokenizerFast, responses: Sequence[str], observations: Sequence[str]
) -> None:
    """Warn of words that the world does not list: the policy would never say them, and read them as one."""
    for texts, what in (
        (responses, "what the scripted player says, and the policy cannot"),
        (observations, "what is seen, and the policy reads <unk> for it"),
    ):
        if words := _find_unknown_words(tokenizer, texts):
            more = f" and {len(words) - 10} more" if len(words) > 10 else ""
            log.warning("its words() lack %s: %s%s", what, ", ".join(words[:10]), more)


def _find_unknown_words(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[str]:
    """The parts of some texts that have no token of their own."""
    unknown: dict[str, None] = {}
    for text in dict.fromkeys(texts):
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            if token == tokenizer.unk_token_id:
                unknown[text[start:end]] = None
    return list(unknown)


def imitate(model: Qwen3ForCausalLM, batches: Sequence[Sequence[Row]], learning_rate: float) -> None:
    """Maximise the likelihood of the demonstrator's tokens, end tokens included; nothing else is learned."""
    if not batches:
        return
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    steps = len(batches)
    rise = max(1, steps // 10)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / rise, (steps - i) / (steps - rise + 1))
    )
    model.train()
    for chosen in batches:
        ids_BT, label_BT = _pad_batch(chosen, model.config.pad_token_id)
        mask_BT = (ids_BT != model.config.pad_token_id).long()
        hidden_BTD = model.model(input_ids=ids_BT, attention_mask=mask_BT).last_hidden_state
        labelled_BT = label_BT[:, 1:] >= 0  # logits of the player's tokens alone: most tokens are the world's
        logits_SV = model.lm_head(hidden_BTD[:, :-1][labelled_BT])
        loss = torch.nn.functional.cross_entropy(logits_SV, label_BT[:, 1:][labelled_BT])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
    model.eval()


def _batches(demonstrations: Sequence[Row], steps: int, batch: int, random: Random) -> Iterator[list[Row]]:
    """Batches of rows of similar length, so that little is padding; all rows before any comes again."""
    yielded = 0
    while demonstrations and yielded < steps:
        order = random.sample(range(len(demonstrations)), len(demonstrations))
        order.sort(key=lambda i: len(demonstrations[i].prompt) + len(demonstrations[i].completion))
        groups = [order[i : i + batch] for i in range(0, len(order), batch)]
        for group in random.sample(groups, min(len(groups), steps - yielded)):
            yield [demonstrations[i] for i in group]
        yielded += len(groups)


def _pad_batch(chosen: Sequence[Row], pad_id: int) -> tuple[Tensor, Tensor]:
    """Token ids, and as labels those that the player responded with (-100 elsewhere), padded right."""
    ids = [torch.tensor([*row.prompt, *row.completion]) for row in chosen]
    labels = [torch.tensor([0] * len(row.prompt) + row.mask) for row in chosen]
    assert all(len(row.mask) == len(row.completion) for row in chosen)
    ids_BT = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=pad_id)
    mask_BT = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True)
    return ids_BT, ids_BT.masked_fill(mask_BT == 0, -100)


@contextmanager
def _isolated_torch(seed: int) -> Iterator[None]:
    """One thread (several are far slower at this size) and random numbers of this seed; afterwards everything is as before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)
