"""From messages to exact tokens: the model's own chat template, and nothing but appending.

A conversation is never re-rendered. Later turns are a suffix to the tokens that are already there, since many templates
(Qwen3's strips earlier thinking) would write the past anew and train on tokens that nobody sampled.
"""

import threading
from functools import lru_cache
from typing import Any

_REPLY = "REPLY7F3A"  # stands in for the assistant's words while the template is asked what follows them


class Chat:
    """Renders user messages for one tokenizer.

    Attributes:
        end_ids: tokens that end a response: the tokenizer's EOS and the end token of the template.
    """

    def __init__(self, tokenizer: Any, system: str | None = None, thinking: str = "template"):
        self.tokenizer = tokenizer
        self._lock = threading.Lock()  # a fast tokenizer breaks where one thread sets what another reads
        self._head = [{"role": "system", "content": system}] if system else []
        self._options = {} if thinking == "template" else {"enable_thinking": thinking == "on"}
        self._between = lru_cache(4096)(lambda user: self._ids(self._after_reply(user)))  # worlds repeat themselves
        self.end_ids = tuple(dict.fromkeys([self._between("x")[0], tokenizer.eos_token_id]))

    def start(self, user: str) -> list[int]:
        """Tokens of a fresh conversation that waits for its first response."""
        return self._ids(self._text([*self._head, _user(user)]))

    def follow(self, user: str, last_id: int) -> list[int]:
        """Tokens between a response, whose last token is given, and the next one.

        A response that was cut before its end token gets one here: as a template token, which is not trained.
        """
        ids = self._between(user)
        return ids[1:] if last_id == ids[0] else list(ids)

    def decode(self, ids: list[int]) -> str:
        with self._lock:
            return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _after_reply(self, user: str) -> str:
        text = self._text([*self._head, _user("x"), {"role": "assistant", "content": _REPLY}, _user(user)])
        return text[text.index(_REPLY) + len(_REPLY) :]

    def _text(self, messages: list[dict[str, str]]) -> str:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **self._options)

    def _ids(self, text: str) -> list[int]:
        with self._lock:
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}
