"""The folders that configs come from."""

import pytest
from support import ROOT

from aem_exp import config
from aem_exp.config import ConfigError, load
from aem_exp.core import disk

pytestmark = pytest.mark.usefixtures("clean")


def test_a_config_dir_hides_and_adds_files(user_package, tmp_path):
    overlay = tmp_path / "it's my, conf"
    for file, text in {
        "experiment/own.yaml": "# @package _global_\n# own\ndefaults:\n- override /baseline: own\n- _self_\nseed: 5\n",
        "baseline/own.yaml": "# @package _global_\n# own baseline\nbaseline:\n  name: own\n  advantage:\n"
        "    _target_: mine.estimate\ntrainer:\n  loss_type: dapo\n  epsilon: 0.1\n",
        "modulation/none.yaml": "# hides the file of conf/\nname: hidden\n",
    }.items():
        (overlay / file).parent.mkdir(parents=True)
        (overlay / file).write_text(text)
    experiment = load(["+experiment=own", "baseline.advantage.gamma=1", "modulation=none"], overlay)
    assert (experiment.seed, experiment.trainer.epsilon, experiment.modulation.name) == (5, 0.1, "hidden")
    assert experiment.baseline.advantage == {"_target_": "mine.estimate", "gamma": 1.0}
    with pytest.raises(ConfigError) as caught:
        load(["+experiment=own", "baseline.advantage.gama=1"], overlay)
    assert caught.value.field == "baseline.advantage.gama" and "gamma" in caught.value.remedy
    with pytest.raises(ConfigError) as caught:
        load([], tmp_path / "missing")
    assert (caught.value.field, caught.value.value) == ("--config-dir", tmp_path / "missing")
    (overlay / "config.yaml").write_text((ROOT / "conf/config.yaml").read_text().replace("seed: 0", "seed: 9"))
    assert load(["modulation=none"], overlay).seed == 9
    (overlay / "baseline/own.yaml").write_text("a: [")
    with pytest.raises(ConfigError) as caught:
        load(["baseline=own"], overlay)
    assert caught.value.value == str(overlay / "baseline/own.yaml") and "YAML" in caught.value.remedy


def test_other_folders_of_a_config_dir_are_not_groups(tmp_path):
    """With `--config-dir .` and runs in ./outputs, `outputs` is still a key."""
    (tmp_path / "outputs").mkdir()
    (tmp_path / "env").mkdir()
    (tmp_path / "env" / "own.yaml").write_text((ROOT / "conf/env/household.yaml").read_text())
    experiment = load(["env=own", "outputs=elsewhere"], tmp_path)
    assert (experiment.outputs, experiment.env.name) == ("elsewhere", "household")


def test_conf_comes_from_the_environment_the_wheel_or_the_checkout(monkeypatch, tmp_path):
    assert config.conf_root() == ROOT / "conf"
    monkeypatch.setenv("AEM_ROOT", str(tmp_path))
    assert config.conf_root() == tmp_path / "conf"
    with pytest.raises(ConfigError) as caught:
        load([])
    assert caught.value.field == "AEM_ROOT"
    monkeypatch.delenv("AEM_ROOT")
    monkeypatch.setattr(disk, "PACKAGE", tmp_path / "aem_exp")
    (tmp_path / "aem_exp/_bundled/conf").mkdir(parents=True)
    assert config.conf_root() == tmp_path / "aem_exp/_bundled/conf"
