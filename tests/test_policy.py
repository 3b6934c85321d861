"""Where weights are looked for, and whose code runs."""

import json
from dataclasses import replace

import pytest
import toy

from aem_exp import policy, sharded
from aem_exp.config import ConfigError, Model


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mine"}))
    (tmp_path / "modeling_mine.py").write_text("print('hello')")
    (tmp_path / "model.safetensors").touch()
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


def test_a_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"holds no \*\.safetensors"):
        policy.locate(Model(path=str(folder)))


def test_weights_that_are_not_here_name_the_command_that_fetches_them():
    with pytest.raises(ConfigError, match="hf download Qwen/Nothing --revision abc"):
        policy.locate(Model(path="Qwen/Nothing", revision="abc"))


def test_one_process_of_a_node_reads_the_weights(tmp_path, monkeypatch):
    import torch.distributed as dist

    _, tokenizer = toy.policy(tmp_path)
    tokenizer.save_pretrained(tmp_path / "policy-full-0")

    def read() -> bool:
        weights, _ = policy.load(Model(), str(tmp_path / "policy-full-0"), 0)
        return any(weight.any() for weight in weights.parameters())

    for name in ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING"):
        monkeypatch.setenv(name, "false")
    monkeypatch.setenv("LOCAL_RANK", "1")
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        assert read()
        sharded.read_once({"fsdp_config": {"cpu_ram_efficient_loading": True}})
        assert not read()
        monkeypatch.setenv("LOCAL_RANK", "0")
        assert read()
    finally:
        dist.destroy_process_group()
