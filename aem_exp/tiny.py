"""Creates a tiny policy for tests and examples: a word-level tokenizer and a small Qwen3.

Its warm start imitates the scripted player of the environment.
"""

import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Final, Protocol

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from aem_exp.config import Env
from aem_exp.core.errors import ConfigError
from aem_exp.demonstrations import KEPT_TEXTS, ScriptedWorld, play_scripted
from aem_exp.rollout.chat import Chat
from aem_exp.rollout.rows import Row, build_rows
from aem_exp.rollout.types import Episode

log = logging.getLogger("aem_exp")
PAD: Final = "<pad>"
UNKNOWN: Final = "<unk>"
END: Final = "<|im_end|>"
HEADERS: Final = ("<|im_start|>system", "<|im_start|>user", "<|im_start|>assistant")  # one token each, for shorter rows

# ChatML. Later turns are only appended, so the tokens of a conversation are a prefix of those of a longer one. The tokenizer
# drops white space, including line breaks.
CHAT_TEMPLATE: Final = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_TOKEN: Final = r"</?[a-z]+>|\d+|[^\W\d_]+|[^\w\s]|_"  # a tag, a number, a word, or a sign
CHECKED_TEXTS: Final = KEPT_TEXTS  # demonstrations and responses that are checked for unknown words
_TEMPLATE_FIELD: Final = r"\{\w*\}"  # a field of a prompt template


class Teachable(ScriptedWorld, Protocol):
    """A world with a vocabulary and a scripted player."""

    def words(self) -> Iterable[str]:
        """All words and fixed phrases of observations and actions."""


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
    whole_lines: bool = False,
    learn_prompts: bool = False,
    seed: int = 0,
) -> None:
    """Create a policy that sometimes succeeds in `world`, and write it to `folder` in Hugging Face format.

    The policy first imitates a player that solves the tasks, and learns the skill. It then briefly imitates a *shy* player,
    which avoids the decisive actions, and learns a habit that mostly prevents success. Training can recover the skill; a lower
    temperature alone does not.

    Args:
        env: the rules of episodes: prompts, history and limits. The warm start sees the same tokens as a rollout.
        hidden_size: width of the model.
        layers: number of layers.
        heads: number of attention heads per layer.
        initializer_range: standard deviation of the initial weights; with the usual 0.02, such a small model hardly learns.
        episodes: number of demonstrations on training tasks.
        noise: probability that an action of the demonstrations is random.
        shyness: probability that the shy player avoids a decisive action; the environment defines which actions these are.
        steps: number of updates on demonstrations of the first player.
        habit_steps: number of updates on demonstrations of the shy player.
        batch: demonstrations per update.
        learning_rate: peak learning rate; it rises in the first tenth of the updates, then falls to zero.
        whole_lines: encode each fixed line of the prompt templates as one token, for shorter rows.
        learn_prompts: predict the prompts, too, not only the player's tokens. A model of several layers then learns to copy
            names from its prompt in fewer updates.
        seed: seeds the weights and all draws.

    Raises:
        ConfigError: the world has no vocabulary or no scripted player.
        RunError: no demonstration could be played.
    """
    if not (hasattr(world, "words") and hasattr(world, "expert")):
        remedy = "choose an environment with a scripted player, or load a policy with model.path"
        raise ConfigError("model.make", f"{__name__}.make", remedy=remedy)
    words = world.words()  # called once: a world may play episodes to collect them
    if isinstance(words, str):
        raise ConfigError("env.make", type(world).__name__, remedy="its words() must list words, but returns one text")
    if episodes < 1:
        raise ConfigError("model.make.episodes", episodes, remedy="the warm start needs at least 1 episode to imitate")
    tokenizer = make_tokenizer(words, env, whole_lines)
    with _isolated_torch(seed):
        model = make_policy(tokenizer, env, hidden_size, layers, heads, initializer_range)
        random = Random(seed)
        skill = demonstrate(world, env, tokenizer, episodes, noise, 0.0, random)
        habit = demonstrate(world, env, tokenizer, max(1, episodes // 4), noise, shyness, random)
        batches = [*iterate_batches(skill, steps, batch, random), *iterate_batches(habit, habit_steps, batch, random)]
        imitate(model, batches, learning_rate, learn_prompts)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_tokenizer(words: Iterable[str], env: Env, whole_lines: bool = False) -> PreTrainedTokenizerFast:
    """Create a tokenizer with one token per word, sign, number and fixed phrase of several words.

    Everything else becomes `<unk>`. Decoding joins tokens with spaces.

    Args:
        whole_lines: a line of a prompt template is a phrase, too; a field or a line break ends it.
    """
    lexicon = list(dict.fromkeys([*words, *(_fixed_lines(env) if whole_lines else [])]))
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
    # A phrase must not match the beginning of a longer word.
    phrase_patterns = [re.escape(text) + (r"(?!\w)" if text[-1].isalnum() else "") for text in phrases]
    pattern = Regex("|".join([*phrase_patterns, _TOKEN]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern, behavior="removed", invert=True)  # keep only the matches
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


def _fixed_lines(env: Env) -> list[str]:
    """The text of the prompt templates between fields and line breaks, in parts of several words."""
    lines = re.split(rf"{_TEMPLATE_FIELD}|\n", "\n".join(env.prompt.values()))
    return [line.strip() for line in lines if len(re.findall(_TOKEN, line)) > 1]


def make_policy(
    tokenizer: PreTrainedTokenizerFast, env: Env, hidden_size: int, layers: int, heads: int, initializer_range: float
) -> Qwen3ForCausalLM:
    """Create a Qwen3 with random weights."""
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
            torch.nn.init.constant_(weight, 1.5)  # with 1, the attention of such small heads cannot become sharp
    return model


def demonstrate(
    world: Teachable,
    env: Env,
    tokenizer: PreTrainedTokenizerFast,
    episodes: int,
    noise: float,
    shyness: float,
    random: Random,
) -> list[Row]:
    """Play episodes with the scripted player and return their rows, with the same code as the rollout of a policy."""
    tasks = world.tasks("train")
    episodes_to_play = [Episode(tasks[i % len(tasks)], i, 0, ()) for i in range(episodes)]
    usable, responses = play_scripted(world, env, Chat(tokenizer), episodes_to_play, noise, shyness, random)
    if not shyness:  # the shy player uses the same words
        observations = [r.observation for t in usable[:CHECKED_TEXTS] for r in t.responses]
        _warn_unknown_words(tokenizer, responses, observations)
    return build_rows(usable, env.history)


def _warn_unknown_words(
    tokenizer: PreTrainedTokenizerFast, responses: Sequence[str], observations: Sequence[str]
) -> None:
    """Warn about words that `words()` lacks: the policy cannot generate them, and reads all of them as `<unk>`."""
    for texts, source in (
        (responses, "responses of the scripted player (the policy cannot generate them)"),
        (observations, "observations (the policy reads <unk> instead)"),
    ):
        if words := _find_unknown_words(tokenizer, texts):
            more = f" and {len(words) - 10} more" if len(words) > 10 else ""
            log.warning("words() of the environment lacks words in %s: %s%s", source, ", ".join(words[:10]), more)


def _find_unknown_words(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[str]:
    """The parts of the texts that become `<unk>`."""
    unknown: dict[str, None] = {}
    for text in dict.fromkeys(texts):
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            if token == tokenizer.unk_token_id:
                unknown[text[start:end]] = None
    return list(unknown)


def imitate(
    model: Qwen3ForCausalLM, batches: Sequence[Sequence[Row]], learning_rate: float, learn_prompts: bool = False
) -> None:
    """Maximise the likelihood of the player's tokens, end tokens included. With `learn_prompts`, of all other tokens too."""
    if not batches:
        return
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    steps = len(batches)
    warmup = max(1, steps // 10)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warmup, (steps - i) / (steps - warmup + 1))
    )
    model.train()
    for chosen in batches:
        ids_BT, label_BT = pad_batch(chosen, model.config.pad_token_id)
        mask_BT = (ids_BT != model.config.pad_token_id).long()
        if learn_prompts:
            label_BT = ids_BT.masked_fill(mask_BT == 0, -100)
        hidden_BTD = model.model(input_ids=ids_BT, attention_mask=mask_BT).last_hidden_state
        labelled_BT = label_BT[:, 1:] >= 0  # compute logits only for the player's tokens, a minority
        logits_SV = model.lm_head(hidden_BTD[:, :-1][labelled_BT])
        loss = torch.nn.functional.cross_entropy(logits_SV, label_BT[:, 1:][labelled_BT])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
    model.eval()


def iterate_batches(demonstrations: Sequence[Row], steps: int, batch: int, random: Random) -> Iterator[list[Row]]:
    """Yield batches of rows with similar lengths, for little padding. Each row is used once before any row is used again."""
    yielded = 0
    while demonstrations and yielded < steps:
        order = random.sample(range(len(demonstrations)), len(demonstrations))
        order.sort(key=lambda i: len(demonstrations[i].prompt) + len(demonstrations[i].completion))
        groups = [order[i : i + batch] for i in range(0, len(order), batch)]
        for group in random.sample(groups, min(len(groups), steps - yielded)):
            yield [demonstrations[i] for i in group]
        yielded += len(groups)


def pad_batch(chosen: Sequence[Row], pad_id: int) -> tuple[Tensor, Tensor]:
    """Token ids and labels, each (B, T), padded on the right. Labels are the player's tokens, and -100 elsewhere."""
    ids = [torch.tensor([*row.prompt, *row.completion]) for row in chosen]
    labels = [torch.tensor([0] * len(row.prompt) + row.mask) for row in chosen]
    assert all(len(row.mask) == len(row.completion) for row in chosen)
    ids_BT = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=pad_id)
    mask_BT = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True)
    return ids_BT, ids_BT.masked_fill(mask_BT == 0, -100)


@contextmanager
def _isolated_torch(seed: int) -> Iterator[None]:
    """Use one thread (several are much slower at this size) and this seed; restore both at the end."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)
