"""Locating and loading a policy: hub cache and folders, reviewed remote code, complete weights."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import toy

from aem_exp import policy
from aem_exp.config import ConfigError, Model
from aem_exp.training import fsdp


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mine"}))
    (tmp_path / "modeling_mine.py").write_text("print('hello')")
    (tmp_path / "model.safetensors").touch()
    return tmp_path


def reviewed_model(folder):
    """A model whose `code_sha256` is the hash that the error reports."""
    model = Model(path=str(folder), trust_remote_code=True, code_sha256="0" * 64)
    with pytest.raises(ConfigError) as refused:
        policy.locate(model)
    assert refused.value.field == "model.code_sha256"
    (digest,) = re.findall(r"\b[0-9a-f]{64}\b", refused.value.remedy)
    return replace(model, code_sha256=digest)


def test_remote_code_must_have_the_reviewed_hash(folder):
    reviewed = reviewed_model(folder)
    assert policy.locate(reviewed) == str(folder)
    (folder / "modeling_mine.py").write_text("print('changed')")
    with pytest.raises(ConfigError) as refused:
        policy.locate(reviewed)
    assert refused.value.field == "model.code_sha256"


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "config.4.0.0.json"])
@pytest.mark.parametrize("named", ["{}--evil.M", ["other/repo--evil.M", None]], ids=str)
def test_remote_code_in_another_folder_is_refused(folder, tmp_path, file, named):
    """transformers loads `FOLDER--file.Class` from FOLDER, which the hash does not cover."""
    reviewed = reviewed_model(folder)
    names = named.format(tmp_path) if isinstance(named, str) else named
    text = json.dumps({"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "modeling_mine.M", "Auto": names}})
    (folder / file).write_text(text.replace("auto_map", r"\u0061uto_map"))  # another spelling of the key in JSON
    with pytest.raises(ConfigError, match=f"auto_map in {file} .*--evil") as refused:
        policy.locate(reviewed)
    assert refused.value.field == "model.trust_remote_code"
    assert len(str(refused.value).splitlines()) == 1
    (folder / file).write_text(text.replace("--", "__"))
    assert policy.locate(reviewed) == str(folder)


def test_adapter_without_base_weights_is_refused(folder):
    """transformers would load the base model that the adapter names, from any place."""
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/elsewhere"}))
    with pytest.raises(ConfigError, match=r"adapter_config\.json") as refused:
        policy.locate(Model(path=str(folder)))
    assert refused.value.field == "model.path"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The folder of a small model."""
    folder = tmp_path_factory.mktemp("weights")
    _, tokenizer = toy.policy(folder)
    tokenizer.save_pretrained(folder / "policy-full-0")
    return folder / "policy-full-0"


def _cut(file, tensors):
    file.write_bytes(file.read_bytes()[:-100])


def _emptied(file, tensors):
    save_file({}, file, {"format": "pt"})


def _without(name):
    def change(file, tensors):
        save_file({key: value for key, value in tensors.items() if key != name}, file, {"format": "pt"})

    return change


def _with(**more):
    def change(file, tensors):
        save_file({**tensors, **more}, file, {"format": "pt"})

    return change


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        (_without(NORM), f"lack .*{NORM}"),
        (_emptied, "lack .* more tensors"),
        (_with(**{"model.stranger.weight": torch.zeros(2)}), "model.stranger.weight"),
        (_with(**{NORM: torch.zeros(2)}), f"shape .*{NORM}"),
        (_cut, "weights .*read"),
    ],
    ids=["one missing", "all missing", "unexpected tensor", "another shape", "truncated file"],
)
def test_incomplete_or_unexpected_weights_are_refused(weights, tmp_path, change, fact):
    """transformers would continue with random numbers for missing tensors."""
    folder = shutil.copytree(weights, tmp_path / "copy")
    file = folder / "model.safetensors"
    change(file, load_file(file))
    with pytest.raises(ConfigError, match=fact) as refused:
        policy.load(Model(), str(folder), 0)
    assert (refused.value.field, refused.value.value) == ("model.path", str(folder))
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_damaged_model_files_are_refused(weights, tmp_path, name):
    file = shutil.copytree(weights, tmp_path / "copy") / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ConfigError) as refused:
        policy.load(Model(), str(file.parent), 0)
    assert (refused.value.field, refused.value.value) == ("model.path", str(file.parent))
    assert len(str(refused.value).splitlines()) == 1


def test_tied_head_may_be_missing(weights, tmp_path):
    folder = shutil.copytree(weights, tmp_path / "copy")
    tied = json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    tensors = load_file(folder / "model.safetensors")
    assert tied and "lm_head.weight" not in tensors
    model, _ = policy.load(Model(), str(folder), 0)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, folder / "model.safetensors")
    policy.load(Model(), str(folder), 0)


@pytest.mark.parametrize("path", ["/nowhere", "./nowhere", "a/b/c", "name"])
def test_path_must_be_a_folder_or_a_hub_id(path):
    with pytest.raises(ConfigError, match="hub id") as refused:
        policy.locate(Model(path=path))
    assert (refused.value.field, refused.value.value) == ("model.path", path)


def test_folder_must_contain_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"\*\.safetensors"):
        policy.locate(Model(path=str(folder)))


def test_missing_weights_are_refused_with_the_download_command():
    with pytest.raises(ConfigError, match="hf download Qwen/Nothing --revision abc"):
        policy.locate(Model(path="Qwen/Nothing", revision="abc"))


def test_cpu_ram_efficient_loading_reads_weights_in_one_process_per_node(tmp_path, monkeypatch):
    import torch.distributed as dist

    _, tokenizer = toy.policy(tmp_path)
    tokenizer.save_pretrained(tmp_path / "policy-full-0")

    def reads_weights() -> bool:
        model, _ = policy.load(Model(), str(tmp_path / "policy-full-0"), 0)
        return any(weight.any() for weight in model.parameters())

    for name in ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING"):
        monkeypatch.setenv(name, "false")
    monkeypatch.setenv("LOCAL_RANK", "1")
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        assert reads_weights()
        fsdp.enable_ram_efficient_loading({"fsdp_config": {"cpu_ram_efficient_loading": True}})
        assert not reads_weights()
        monkeypatch.setenv("LOCAL_RANK", "0")
        assert reads_weights()
    finally:
        dist.destroy_process_group()
