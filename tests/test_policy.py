"""Where weights are looked for, whose code runs, and that a model has all of its weights."""

import json
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


def test_remote_code_runs_only_as_it_was_reviewed(folder):
    model = Model(path=str(folder), trust_remote_code=True, code_sha256="0" * 64)
    with pytest.raises(ConfigError, match="hashes to") as refused:
        policy.locate(model)
    reviewed = replace(model, code_sha256=str(refused.value).split("hashes to ")[1][:64])
    assert policy.locate(reviewed) == str(folder)
    (folder / "modeling_mine.py").write_text("print('changed')")
    with pytest.raises(ConfigError, match="hashes to"):
        policy.locate(reviewed)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "config.4.0.0.json"])
@pytest.mark.parametrize("named", ["{}--evil.M", ["other/repo--evil.M", None]], ids=str)
def test_code_of_another_folder_is_no_code_that_was_reviewed(folder, tmp_path, file, named):
    """transformers takes `FOLDER--file.Class` from that folder, whose code is in no hash."""
    model = Model(path=str(folder), trust_remote_code=True, code_sha256="0" * 64)
    with pytest.raises(ConfigError, match="hashes to") as refused:
        policy.locate(model)
    reviewed = replace(model, code_sha256=str(refused.value).split("hashes to ")[1][:64])
    names = named.format(tmp_path) if isinstance(named, str) else named
    text = json.dumps({"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "modeling_mine.M", "Auto": names}})
    (folder / file).write_text(text.replace("auto_map", r"\u0061uto_map"))  # as JSON may spell it
    with pytest.raises(ConfigError, match=f"auto_map in {file} names code of another folder") as refused:
        policy.locate(reviewed)
    assert len(str(refused.value).splitlines()) == 1
    (folder / file).write_text(text.replace("--", "__"))
    assert policy.locate(reviewed) == str(folder)


def test_an_adapter_is_no_model(folder):
    """transformers would load the model that the adapter names, from wherever that is."""
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/elsewhere"}))
    with pytest.raises(ConfigError, match="is an adapter"):
        policy.locate(Model(path=str(folder)))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The folder of a small model."""
    place = tmp_path_factory.mktemp("weights")
    _, tokenizer = toy.policy(place)
    tokenizer.save_pretrained(place / "policy-full-0")
    return place / "policy-full-0"


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
    ("change", "said"),
    [
        (_without(NORM), f"lack {NORM}"),
        (_emptied, "more tensors"),
        (_with(**{"model.stranger.weight": torch.zeros(2)}), "has no place for: model.stranger.weight"),
        (_with(**{NORM: torch.zeros(2)}), f"have another shape for {NORM}"),
        (_cut, "cannot be read"),
    ],
    ids=["one lacks", "all lack", "one too many", "another shape", "cut short"],
)
def test_weights_that_are_not_all_of_the_models_are_refused(weights, tmp_path, change, said):
    """transformers goes on with random numbers in their place."""
    folder = shutil.copytree(weights, tmp_path / "copy")
    file = folder / "model.safetensors"
    change(file, load_file(file))
    with pytest.raises(ConfigError) as refused:
        policy.load(Model(), str(folder), 0)
    assert said in str(refused.value) and len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_model_whose_other_files_are_damaged_is_refused(weights, tmp_path, name):
    file = shutil.copytree(weights, tmp_path / "copy") / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ConfigError, match="cannot be read") as refused:
        policy.load(Model(), str(file.parent), 0)
    assert len(str(refused.value).splitlines()) == 1


def test_a_tied_head_need_not_be_there(weights, tmp_path):
    folder = shutil.copytree(weights, tmp_path / "copy")
    tied = json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    tensors = load_file(folder / "model.safetensors")
    assert tied and "lm_head.weight" not in tensors
    model, _ = policy.load(Model(), str(folder), 0)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, folder / "model.safetensors")
    policy.load(Model(), str(folder), 0)


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
        fsdp.enable_ram_efficient_loading({"fsdp_config": {"cpu_ram_efficient_loading": True}})
        assert not read()
        monkeypatch.setenv("LOCAL_RANK", "0")
        assert read()
    finally:
        dist.destroy_process_group()
