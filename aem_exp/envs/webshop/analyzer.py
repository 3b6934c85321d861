"""The text analysis of WebShop's search: Lucene's English analyzer with the configuration of Anserini 0.14.

It has a Unicode tokenizer, removes possessives, converts to lower case, and removes 33 stop words. Its Porter stemmer has the
three later changes of the stemmer's author.
"""

import re
import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from typing import Final

STOP_WORDS: Final = frozenset(
    "a an and are as at be but by for if in into is it no not of on or such that the their then there these they this to was "
    "will with".split()
)
MAX_TOKEN_CHARACTERS: Final = 255  # a longer token is split into several


def analyze(text: str) -> list[str]:
    """The terms of a text, in order."""
    return [
        stem(word) for token in tokenize(text) if (word := _lower(_strip_possessive(token))) and word not in STOP_WORDS
    ]


def _strip_possessive(token: str) -> str:
    """A token without a possessive 's."""
    return token[:-2] if len(token) >= 2 and token[-1] in "sS" and token[-2] in "'\u2019\uff07" else token


def _lower(token: str) -> str:
    """Lower case as in Java, character by character: no final sigma, and one letter for a dotted capital I."""
    lowered = token.lower()
    if len(lowered) == len(token) and "\u03c2" not in lowered:
        return lowered
    return "".join("i" if c == "\u0130" else c.lower() if c != "\u03a3" else "\u03c3" for c in token)


# Tokens. Each character is replaced by the name of its class, and a pattern finds words in the classes.

_MID_BOTH: Final = "'.\u2018\u2019\u2024\ufe52\uff07\uff0e"  # within words and numbers
_MID_LETTER: Final = ":\u00b7\u0387\u05f4\u2027\ufe13\ufe55\uff1a"
_MID_NUMBER: Final = ",;\u037e\u0589\u060c\u060d\u066c\u07f8\u2044\ufe10\ufe14\ufe50\ufe54\uff0c\uff1b"
_EMOJI: Final = (  # ranges (first, last) of Unicode's emoji, in text and picture style
    *(
        (0xA9, 0xA9),
        (0xAE, 0xAE),
        (0x203C, 0x203C),
        (0x2049, 0x2049),
        (0x2122, 0x2122),
        (0x2194, 0x2199),
        (0x21A9, 0x21AA),
    ),
    *((0x231A, 0x231B), (0x2328, 0x2328), (0x23CF, 0x23CF), (0x23E9, 0x23F3), (0x23F8, 0x23FA), (0x25AA, 0x25AB)),
    *((0x25B6, 0x25B6), (0x25C0, 0x25C0), (0x25FB, 0x25FE), (0x2600, 0x2605), (0x2607, 0x2612), (0x2614, 0x2685)),
    *((0x2690, 0x2705), (0x2708, 0x2712), (0x2714, 0x2714), (0x2716, 0x2716), (0x271D, 0x271D), (0x2721, 0x2721)),
    *((0x2728, 0x2728), (0x2733, 0x2734), (0x2744, 0x2744), (0x2747, 0x2747), (0x274C, 0x274C), (0x274E, 0x274E)),
    *((0x2753, 0x2755), (0x2757, 0x2757), (0x2763, 0x2767), (0x2795, 0x2797), (0x27A1, 0x27A1), (0x27B0, 0x27B0)),
    *((0x27BF, 0x27BF), (0x2934, 0x2935), (0x2B05, 0x2B07), (0x2B1B, 0x2B1C), (0x2B50, 0x2B50), (0x2B55, 0x2B55)),
    *((0x3030, 0x3030), (0x303D, 0x303D), (0x3297, 0x3297), (0x3299, 0x3299), (0x1F000, 0x1F0FF), (0x1F200, 0x1F20F)),
    *((0x1F249, 0x1F53D), (0x1F546, 0x1F64F), (0x1F680, 0x1F6FF), (0x1F7D5, 0x1F7FF), (0x1F900, 0x1FAFF)),
)
_WORD: Final = re.compile(
    r"(?:L[ez]*(?:[MQ][ez]*(?=L))?|N[ez]*(?:[nQ][ez]*(?=N))?|_[ez]*)+"  # letters and digits, and characters between two
    r"|(?:K[ez]*|_[ez]*)+|h[ez]*|S[Sez]*|Pm?[ez]*(?:(?<=z)Pm?[ez]*)*|m[ez]*|FF"
)


class _Classes(dict[int, str]):
    """Code point -> its class, computed at the first access."""

    def __missing__(self, point: int) -> str:
        self[point] = name = _character_class(point)
        return name


_CLASSES: Final = _Classes()


def tokenize(text: str) -> Iterator[str]:
    """The words, numbers and emoji of a text."""
    for match in _WORD.finditer(text.translate(_CLASSES)):
        if match[0].strip("_ez"):
            for start in range(match.start(), match.end(), MAX_TOKEN_CHARACTERS):
                yield text[start : min(start + MAX_TOKEN_CHARACTERS, match.end())]


def _character_class(point: int) -> str:
    """The class of a character.

    L: letter, N: number, K: katakana, h: ideograph or hiragana, S: Southeast Asian, P: picture (emoji), m: skin tone, F: flag,
    M, n, Q: between letters, numbers or both, _: connector, e: extender, z: zero-width joiner, space: all others.
    """
    char = chr(point)
    for name, members in (("Q", _MID_BOTH), ("M", _MID_LETTER), ("n", _MID_NUMBER)):
        if char in members:
            return name
    kind = unicodedata.category(char)
    if point == 0x200D:
        return "z"
    if kind in ("Mn", "Me", "Mc") or (kind == "Cf" and point != 0x200B):
        return "e"
    if 0x1F3FB <= point <= 0x1F3FF:
        return "m"
    if 0x1F1E6 <= point <= 0x1F1FF:
        return "F"
    if any(first <= point <= last for first, last in _EMOJI):
        return "P"
    if kind == "Pc" or point == 0x202F:
        return "_"
    if kind == "Nd":
        return "N"
    return _script(char) if kind[0] == "L" or kind == "Nl" else " "


def _script(char: str) -> str:
    name = unicodedata.name(char, "")
    if char in "\u30fc\uff70" or "KATAKANA" in name:
        return "K"
    if name.startswith(("CJK UNIFIED", "CJK COMPATIBILITY")) or "HIRAGANA" in name or char == "\u3007":
        return "h"
    return "S" if name.startswith(("THAI ", "LAO ", "KHMER ", "MYANMAR ", "NEW TAI ", "TAI ")) else "L"


# Porter's stemmer (M. F. Porter, An algorithm for suffix stripping, Program 14, 1980), with three changes that its author made
# in his own programs: `bli`, `logi`, and words of at most two letters stay as they are.

_STEP_2: Final = (
    *(("ational", "ate"), ("tional", "tion"), ("enci", "ence"), ("anci", "ance"), ("izer", "ize"), ("bli", "ble")),
    *(("alli", "al"), ("entli", "ent"), ("eli", "e"), ("ousli", "ous"), ("ization", "ize"), ("ation", "ate")),
    *(("ator", "ate"), ("alism", "al"), ("iveness", "ive"), ("fulness", "ful"), ("ousness", "ous"), ("aliti", "al")),
    *(("iviti", "ive"), ("biliti", "ble"), ("logi", "log")),
)
_STEP_3: Final = (
    *(("icate", "ic"), ("ative", ""), ("alize", "al"), ("iciti", "ic"), ("ical", "ic"), ("ful", ""), ("ness", "")),
)
_STEP_4: Final = (
    *(
        "al",
        "ance",
        "ence",
        "er",
        "ic",
        "able",
        "ible",
        "ant",
        "ement",
        "ment",
        "ent",
        "ion",
        "ou",
        "ism",
        "ate",
        "iti",
    ),
    *("ous", "ive", "ize"),
)


@lru_cache(1 << 18)
def stem(word: str) -> str:
    """The stem of a lower-case word."""
    if len(word) <= 2:
        return word
    return _step_5(_step_4(_replace_ending(_replace_ending(_step_1(word), _STEP_2), _STEP_3)))


def _shape(word: str) -> str:
    """The word as consonants (c) and vowels (v). A y after a consonant is a vowel."""
    shape = ""
    for char in word:
        shape += "v" if char in "aeiou" or (char == "y" and shape[-1:] == "c") else "c"
    return shape


def _measure(word: str) -> int:
    """The number of vowels that are followed by a consonant."""
    return _shape(word).count("vc")


def _ends_short(word: str) -> bool:
    """Whether the word ends with consonant, vowel, consonant, and the last one is not w, x or y."""
    return _shape(word)[-3:] == "cvc" and word[-1] not in "wxy"


def _step_1(word: str) -> str:
    """Remove plural and participle endings, then replace a final y by i."""
    if word.endswith("s"):
        word = word[:-2] if word.endswith(("sses", "ies")) else word if word.endswith("ss") else word[:-1]
    if word.endswith("eed"):
        word = word[:-1] if _measure(word[:-3]) else word
    else:
        for ending in ("ed", "ing"):
            if word.endswith(ending):
                rest = word[: -len(ending)]
                word = _repair_stem(rest) if "v" in _shape(rest) else word
                break
    if word.endswith("y") and "v" in _shape(word[:-1]):
        word = word[:-1] + "i"
    return word


def _repair_stem(word: str) -> str:
    """Restore the word that a participle ending was removed from: hopp -> hop, fil -> file."""
    if word.endswith(("at", "bl", "iz")):
        return word + "e"
    if len(word) > 1 and word[-1] == word[-2] and _shape(word)[-1] == "c":
        return word if word[-1] in "lsz" else word[:-1]
    return word + "e" if _measure(word) == 1 and _ends_short(word) else word


def _replace_ending(word: str, rules: tuple[tuple[str, str], ...]) -> str:
    """Replace the longest ending that has a rule, if the rest of the word is long enough."""
    for ending, replacement in sorted(rules, key=lambda rule: -len(rule[0])):
        if word.endswith(ending):
            rest = word[: -len(ending)]
            return rest + replacement if _measure(rest) else word
    return word


def _step_4(word: str) -> str:
    for ending in sorted(_STEP_4, key=len, reverse=True):
        if word.endswith(ending):
            rest = word[: -len(ending)]
            return rest if _measure(rest) > 1 and (ending != "ion" or rest[-1] in "st") else word
    return word


def _step_5(word: str) -> str:
    """Remove a final e, and one l of a final ll."""
    if word.endswith("e"):
        rest = word[:-1]
        if _measure(rest) > 1 or (_measure(rest) == 1 and not _ends_short(rest)):
            word = rest
    return word[:-1] if word.endswith("ll") and _measure(word) > 1 else word
