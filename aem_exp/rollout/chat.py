"""Renders messages as exact token ids with the model's chat template.

A conversation only grows: each turn is appended to the existing tokens, and earlier turns are never rendered again.
"""

import threading
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from aem_exp.core.errors import ConfigError

# Seconds for the first rendering, which normally takes milliseconds. A template is a program and may loop forever.
TEMPLATE_TIMEOUT = 60.0
_REPLY = (
    "REPLY7F3A"  # placeholder for an assistant message: the text after it is the template's text between two responses
)


class Chat:
    """Renders user messages for one tokenizer. Methods may be called from several threads.

    Args:
        system: system message at the start of every conversation; None: no system message.
        thinking: "on" or "off" sets `enable_thinking` of the template; "template" keeps the template's default.

    Attributes:
        end_ids: ids of the tokens that end a response: the template's end-of-turn token and the tokenizer's EOS.

    Raises:
        ConfigError: the chat template fails, drops assistant messages, or does not finish within `TEMPLATE_TIMEOUT`.
    """

    def __init__(self, tokenizer: Any, system: str | None = None, thinking: str = "template"):
        self.tokenizer = tokenizer
        self._lock = threading.Lock()  # fast tokenizers are not thread-safe
        self._system = [{"role": "system", "content": system}] if system else []
        self._options = {} if thinking == "template" else {"enable_thinking": thinking == "on"}
        self._ids_after_reply = lru_cache(4096)(self._tokenize_after_reply)  # many observations repeat
        end_of_turn = _run_with_timeout(lambda: self._ids_after_reply("x")[0], tokenizer)
        self.end_ids = tuple(dict.fromkeys([end_of_turn, tokenizer.eos_token_id]))

    def first_prompt(self, user: str) -> list[int]:
        """Token ids of a new conversation, up to its first response."""
        return self._tokenize(self._apply_template([*self._system, _user_message(user)]))

    def next_prompt(self, user: str, last_id: int) -> list[int]:
        """Token ids between a response and the next one.

        If the response was cut before its end token, the result starts with the missing end token. It counts as a template
        token, which is not trained.

        Args:
            user: the next user message.
            last_id: id of the last token of the response.
        """
        ids = self._ids_after_reply(user)
        return ids[1:] if last_id == ids[0] else list(ids)

    def decode(self, ids: list[int]) -> str:
        """Decode a response, without special tokens."""
        with self._lock:
            return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _tokenize_after_reply(self, user: str) -> list[int]:
        return self._tokenize(self._text_after_reply(user))

    def _text_after_reply(self, user: str) -> str:
        text = self._apply_template(
            [*self._system, _user_message("x"), {"role": "assistant", "content": _REPLY}, _user_message(user)]
        )
        _, reply, after = text.partition(_REPLY)
        if not reply:
            raise ValueError("it drops assistant messages")
        return after

    def _apply_template(self, messages: list[dict[str, str]]) -> str:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **self._options)

    def _tokenize(self, text: str) -> list[int]:
        with self._lock:
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def _run_with_timeout(render: Callable[[], int], tokenizer: Any) -> int:
    """Render for the first time, with a time limit. The thread of a template that does not finish is abandoned."""
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
        raise ConfigError("model.path", folder, f"its chat template did not finish within {TEMPLATE_TIMEOUT:.0f} s")
    return done[0]


def _user_message(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}
