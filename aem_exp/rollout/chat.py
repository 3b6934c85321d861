"""Turns messages into exact tokens with the model's own chat template.

A conversation only grows: later turns are appended to the tokens that are there, and nothing is rendered again.
"""

import threading
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from aem_exp.core.errors import ConfigError

TEMPLATE_TIMEOUT = (
    60.0  # seconds for the first rendering, which takes milliseconds: a template is a program, and may not end
)
_REPLY = "REPLY7F3A"  # the assistant's message from which the template shows what follows one


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
        self._between = lru_cache(4096)(self._tokenize_after_reply)  # worlds repeat themselves
        first = _run_with_timeout(lambda: self._between("x")[0], tokenizer)
        self.end_ids = tuple(dict.fromkeys([first, tokenizer.eos_token_id]))

    def first_prompt(self, user: str) -> list[int]:
        """Tokens of a new conversation, up to its first response."""
        return self._tokenize(self._apply_template([*self._head, _user_message(user)]))

    def next_prompt(self, user: str, last_id: int) -> list[int]:
        """Tokens between a response, whose last token is given, and the next one.

        A response that was cut before its end token gets one here: as a template token, which is not trained.
        """
        ids = self._between(user)
        return ids[1:] if last_id == ids[0] else list(ids)

    def decode(self, ids: list[int]) -> str:
        """The text of a response, without special tokens."""
        with self._lock:
            return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _tokenize_after_reply(self, user: str) -> list[int]:
        return self._tokenize(self._text_after_reply(user))

    def _text_after_reply(self, user: str) -> str:
        text = self._apply_template(
            [*self._head, _user_message("x"), {"role": "assistant", "content": _REPLY}, _user_message(user)]
        )
        _, reply, after = text.partition(_REPLY)
        if not reply:
            raise ValueError("it leaves out what the assistant said")
        return after

    def _apply_template(self, messages: list[dict[str, str]]) -> str:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **self._options)

    def _tokenize(self, text: str) -> list[int]:
        with self._lock:
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def _run_with_timeout(render: Callable[[], int], tokenizer: Any) -> int:
    """Render for the first time, within a time limit; a template that does not end is abandoned in its thread."""
    done: list[int] = []
    errors: list[Exception] = []

    def work() -> None:
        try:
            done.append(render())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(TEMPLATE_TIMEOUT)
    folder = getattr(tokenizer, "name_or_path", "")
    if errors and (type(errors[0]).__module__.startswith("jinja2") or isinstance(errors[0], ValueError)):
        raise ConfigError("model.path", folder, f"its chat template fails: {errors[0]}") from errors[0]
    if errors:
        raise errors[0]
    if not done:
        raise ConfigError("model.path", folder, f"its chat template did not end within {TEMPLATE_TIMEOUT:.0f} s")
    return done[0]


def _user_message(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}
