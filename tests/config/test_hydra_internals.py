"""Hydra's private names: the tested versions, and the fallback without them."""

import pytest

from aem_exp.config import ConfigError, hydra_internals
from aem_exp.config.compose import Composer, compose

pytestmark = pytest.mark.usefixtures("clean")


def test_the_installed_hydra_is_tested():
    version = hydra_internals.hydra_version()
    assert version in hydra_internals.TESTED_VERSIONS, f"add {version} to TESTED_VERSIONS when the tests pass with it"
    assert hydra_internals.is_supported(), "this version of Hydra lacks one of hydra_internals.PRIVATE_NAMES"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "value"), [("TESTED_VERSIONS", ("0.0",)), ("PRIVATE_NAMES", ("defaults_list:none",))])
def test_an_untested_hydra_composes_the_same_without_private_names(monkeypatch, tmp_path, name, value):
    words = ["+experiment=alfworld_1_5b", "baseline=gigpo", "seed=3", "trainer.steps=2"]
    quick = Composer().compose(words)
    monkeypatch.setattr(hydra_internals, name, value)
    assert not hydra_internals.is_supported()
    assert Composer().compose(words) == compose(words) == quick
    (tmp_path / "baseline").mkdir()
    (tmp_path / "baseline" / "mine.yaml").write_text("advantage: !!python/name:os.system\n")
    with pytest.raises(ConfigError) as caught:
        compose(["baseline=mine"], tmp_path)
    assert caught.value.value == str(tmp_path / "baseline" / "mine.yaml") and "os.system" in caught.value.remedy
