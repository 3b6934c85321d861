"""Fixtures of the tests of configs."""

import pytest
from omegaconf import DictConfig
from support.configs import FIXED

from aem_exp.config import Experiment, load
from aem_exp.config.compose import compose


@pytest.fixture(scope="module")
def default() -> Experiment:
    """The experiment of the fixed settings."""
    return load(FIXED)


@pytest.fixture(scope="module")
def composed() -> DictConfig:
    """The same as a composed config, not yet resolved."""
    return compose(FIXED)


MODULE = """
import nothing_of_this_name
from dataclasses import dataclass, field
from typing import ClassVar, Literal

@dataclass
class Base:
    size: int
    note: str = "x"

@dataclass
class Child(Base):
    shared: ClassVar[int] = 0
    items: list = field(default_factory=list)
    hidden: int = field(init=False)
    kind: Literal["a", "b"] = "a"

class Plain(Unknown): ...

class Init:
    def __init__(self, width: float, /, *, deep: "bool | None" = None): ...

def estimate(played, *, gamma: float = 0.5): ...
def anything(**options): ...
alias = estimate
"""


@pytest.fixture
def user_package(tmp_path, monkeypatch):
    """A package `mine` of the user, on `sys.path`; importing it would fail."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/__init__.py").write_text(
        "from .things import Child as Renamed\nfrom mine.things import estimate\n"
    )
    (tmp_path / "mine/things.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
