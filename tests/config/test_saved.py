"""experiment.json: written, read back, and compared with other runs."""

import dataclasses
import json

import pytest
from support.configs import with_trainer

from aem_exp import config
from aem_exp.config import load

pytestmark = pytest.mark.usefixtures("clean")


@pytest.mark.parametrize("overrides", [[], ["+experiment=alfworld_1_5b"], ["+experiment=swebench_32b", "seed=3"]])
def test_experiment_json_brings_back_the_same_value(overrides):
    experiment = load(overrides)
    again = config.from_dict(json.loads(json.dumps(config.to_dict(experiment))))
    assert again == experiment
    assert config.signature(again) == config.signature(experiment)
    assert config.diff(again, experiment) == []


def test_a_plain_mapping_resolves_too(default):
    assert config.resolve(config.to_dict(default)) == default


def test_diff_and_nearest(default, tmp_path):
    near, far = with_trainer(default, beta=0.5), dataclasses.replace(with_trainer(default, beta=0.7, steps=1), seed=3)
    for experiment in (near, far):
        folder = config.run_dir(experiment)
        folder.mkdir(parents=True)
        (folder / "experiment.json").write_text(json.dumps(config.to_dict(experiment)))
    (tmp_path / "outputs/broken").mkdir()
    (tmp_path / "outputs/broken/experiment.json").write_text("{")
    assert config.diff(far, default) == ["seed: 3 -> 0", "trainer.steps: 1 -> 60", "trainer.beta: 0.7 -> 0.0"]
    assert config.nearest_run(default) == (config.run_dir(near), ["trainer.beta: 0.5 -> 0.0"])
