"""Where weights are looked for, and whose code runs."""

import json
from dataclasses import replace

import pytest

from aem_exp import policy
from aem_exp.config import ConfigError, Model


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mine"}))
    (tmp_path / "modeling_mine.py").write_text("print('hello')")
    return tmp_path


def test_remote_code_runs_only_as_it_was_reviewed(folder):
    model = Model(path=str(folder), trust_remote_code=True, code_sha256="0" * 64)
    with pytest.raises(ConfigError, match="hashes to") as refused:
        policy.locate(model)
    reviewed = replace(model, code_sha256=str(refused.value).split("hashes to ")[1][:64])
    assert policy.locate(reviewed) == str(folder)
    (folder / "modeling_mine.py").write_text("print('changed')")
    with pytest.raises(ConfigError, match="hashes to"):
        policy.locate(reviewed)


@pytest.mark.parametrize("path", ["/nowhere", "./nowhere", "a/b/c", "name"])
def test_what_is_neither_a_folder_nor_an_id(path):
    with pytest.raises(ConfigError, match="hub id"):
        policy.locate(Model(path=path))


def test_weights_that_are_not_here_name_the_command_that_fetches_them():
    with pytest.raises(ConfigError, match="hf download Qwen/Nothing --revision abc"):
        policy.locate(Model(path="Qwen/Nothing", revision="abc"))
