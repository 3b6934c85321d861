"""Prompts of later turns under the chat templates of real model families (TRL contains the templates)."""

from pathlib import Path

import pytest
import trl
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from aem_exp.core.errors import ConfigError
from aem_exp.rollout import chat
from aem_exp.rollout.chat import Chat

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
FAMILIES = {  # template -> (end of a turn, header of a user message)
    "qwen2_5": ("<|im_end|>", "<|im_start|>user"),
    "qwen3": ("<|im_end|>", "<|im_start|>user"),
    "llama3": ("<|eot_id|>", "<|start_header_id|>user"),
    "gemma": ("<end_of_turn>", "<start_of_turn>user"),
    "phi3": ("<|end|>", "<|user|>"),
}


def tokenizer(family):
    """One token per byte, plus the end token of the family."""
    end, _ = FAMILIES[family]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(sorted(alphabet))}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    from tokenizers import decoders

    core.decoder = decoders.ByteLevel()
    template = (TEMPLATES / f"{family}.jinja").read_text()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=end, bos_token="<s>", chat_template=template)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("closed", [True, False], ids=["ended", "cut"])
def test_second_prompt_continues_the_conversation_with_one_end_token(family, closed):
    """There is one end token after the response, sampled or added by `next_prompt`."""
    tok = tokenizer(family)
    chat = Chat(tok)
    end, user = FAMILIES[family]
    assert tok.eos_token_id in chat.end_ids
    reply = tok("<think>hm</think>go", add_special_tokens=False)["input_ids"] + ([tok.eos_token_id] if closed else [])
    head = chat.first_prompt("first")
    follow = chat.next_prompt("second", reply[-1])
    assert (follow[0] == tok.eos_token_id) is not closed
    text = tok.decode(head + reply + follow)
    assert "<think>hm</think>go" + end in text  # earlier thinking is kept, because responses are not rendered again
    assert text.count(user) == 2
    assert text.index("first") < text.index("go" + end) < text.index("second")
    assert (
        tok.decode(head)[-20:].split(user)[-1] in text[text.index("second") :]
    )  # the same header before each response


@pytest.mark.parametrize(
    ("thinking", "opens"), [("on", False), ("off", True), ("template", False)], ids=["on", "off", "template"]
)
def test_qwen3_thinking_follows_the_option(thinking, opens):
    tok = tokenizer("qwen3")
    chat = Chat(tok, thinking=thinking)
    for ids in (chat.first_prompt("first"), chat.next_prompt("second", tok.eos_token_id)):
        assert ("<think>\n\n</think>" in tok.decode(ids)) is opens


def test_system_message_is_first_and_not_repeated():
    tok = tokenizer("qwen2_5")
    chat = Chat(tok, system="be brief")
    assert tok.decode(chat.first_prompt("first")).startswith("<|im_start|>system\nbe brief<|im_end|>")
    assert "be brief" not in tok.decode(chat.next_prompt("second", 0))


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("template", "fact"),
    [
        (ENDLESS, "within 1 s"),
        ("{{ raise_exception('no user') }}", "no user"),
        ("{% for m in messages %}", "nexpected end of template"),
        ("{{ messages[0].content }}", "assistant"),
    ],
    ids=["endless", "raises", "unclosed loop", "no assistant messages"],
)
def test_invalid_chat_template_is_a_config_error(monkeypatch, template, fact):
    monkeypatch.setattr(chat, "TEMPLATE_TIMEOUT", 1.0 if template == ENDLESS else 600.0)
    tok = tokenizer("qwen2_5")
    tok.chat_template = template
    with pytest.raises(ConfigError) as caught:
        Chat(tok)
    assert caught.value.field == "model.path"
    assert "chat template" in caught.value.remedy and fact in caught.value.remedy
    assert "\n" not in str(caught.value)
