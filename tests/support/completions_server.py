"""A small server of vLLM's completions protocol that really generates, with a policy of a folder, on this machine's CPU.

What it keeps of the protocol: token ids in and out, seeds, temperature and filters, end tokens, budgets, log-probs, the key
(asked for under /v1 alone, as vLLM does), weights read anew from a folder, words of errors. What it does not: batches; it
answers one request after another. A test may make it slow, sick or wrong, or start it without a way to read other weights.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from safetensors.torch import load_file

from aem_exp.rollout.sampling.base import SamplingParams
from aem_exp.rollout.sampling.local import LocalSampler

WANTED = {
    "prompt",
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stop_token_ids",
    "return_token_ids",
}


class CompletionsServer:
    """Serves while the context lives. `policy`: a folder, or what is loaded; `port`: that of a server that it is to replace.

    Attributes:
        asked: the requests for tokens, as they came, whether or not they were answered well.
        reloads: the folders whose weights were read.
        fails: statuses that the next requests for tokens get instead of an answer.
        seconds: that each request for tokens takes longer.
        twist: changes an answer before it is sent.
        raw: sends the whole answer to a request for tokens itself, given the handler; None: the server does.
        develops: whether it has VLLM_SERVER_DEV_MODE=1, and so reads weights.
        longest: tokens of a request, at most.
        root: what it says that it was started with.
        ends_at: the number of the request for tokens over which it dies, unanswered; 0: none.
        ended: set when it has ended.
    """

    def __init__(self, policy, key="", port=0, host="127.0.0.1"):
        self.develops, self.longest, self.root = True, 1 << 20, str(policy)
        self.model = loaded(policy) if isinstance(policy, str | Path) else policy
        self.key, self.seconds, self.twist, self.raw = key, 0.0, lambda answer: answer, None
        self.asked, self.reloads, self.fails = [], [], []
        self.ends_at, self.ended = 0, threading.Event()
        self.at_once = self.most_at_once = 0
        self._lock = threading.Lock()
        self._http = _Http((host, port), _handler(self))
        self.url = f"http://{host}:{self._http.server_port}"

    @property
    def port(self):
        return self._http.server_port

    def __enter__(self):
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._http.shutdown()
        self._http.server_close()
        for connection in self._http.connections:  # as if the process had died
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.ended.set()

    def complete(self, asked):
        with self._lock:
            self.asked.append(asked)
            dies = len(self.asked) == self.ends_at
        if dies:
            self.__exit__()
            return 500, {}
        with self._lock:
            if self.fails:
                return self.fails.pop(0), {"error": {"message": "the engine is not well"}}
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            if missing := WANTED - asked.keys():
                return 400, {"error": {"message": f"{missing} must be said"}}
            time.sleep(self.seconds)
            with self._lock:
                return 200, self.twist(self._answer(asked))
        finally:
            with self._lock:
                self.at_once -= 1

    def _answer(self, asked):
        torch.set_num_threads(1)
        sampling = SamplingParams(*(asked[name] for name in ("temperature", "top_p", "top_k", "min_p")))
        session = LocalSampler(self.model, asked["stop_token_ids"], sampling).session()
        (sample,) = session.generate([0], [asked["prompt"]], [(asked["seed"],)], [asked["max_tokens"]])
        ended = sample.ids[-1] in asked["stop_token_ids"]
        choice = {
            "index": 0,
            "text": "never read",
            "finish_reason": "stop" if ended else "length",
            "token_ids": sample.ids,
            "prompt_token_ids": asked["prompt"],
            "logprobs": {"token_logprobs": sample.logps, "tokens": ["?"] * len(sample.ids)},
        }
        return {"object": "text_completion", "choices": [choice]}

    def models(self):
        card = {"id": "policy", "object": "model", "root": self.root, "parent": None, "max_model_len": self.longest}
        return 200, {"object": "list", "data": [card, card | {"id": "other", "root": "/adapter", "parent": "policy"}]}

    def rpc(self, asked):
        if asked["method"] != "reload_weights":
            return 400, {"error": {"message": "no such method"}}
        folder = Path(asked["kwargs"]["weights_path"])
        if not folder.is_dir():
            return 500, {"error": {"message": f"cannot find {folder}"}}
        with self._lock:
            found = {name: weight for file in folder.glob("*.safetensors") for name, weight in load_file(file).items()}
            missing, strange = self.model.load_state_dict(found, strict=False)
            assert not strange and all("lm_head" in name for name in missing), (missing, strange)  # tied
            self.reloads.append(folder.name)
        return 200, {"results": [None]}


def loaded(folder):
    """A policy; not to be loaded by two threads at a time, as transformers then makes half of one."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(self, *args):
        self.connections = []
        super().__init__(*args)

    def get_request(self):
        connection, address = super().get_request()
        self.connections.append(connection)
        return connection, address


def _handler(server):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            if self.path.startswith("/v1/") and not self._known():
                self._say(401, {"error": "Unauthorized"})
            elif self.path == "/v1/models":
                self._say(*server.models())
            else:
                self._say(200 if self.path == "/health" else 404, {})

        def do_POST(self):
            length = int(self.headers["Content-Length"])
            if len(body := self.rfile.read(length)) < length:  # hung up
                self.close_connection = True
                return
            asked = json.loads(body)
            if self.path.startswith("/v1/") and not self._known():
                self._say(401, {"error": "Unauthorized"})
            elif self.path == "/v1/completions" and server.raw:
                self.close_connection = True
                with contextlib.suppress(OSError):  # hung up
                    server.raw(self)
            elif self.path == "/v1/completions":
                self._say(*server.complete(asked))
            elif self.path == "/collective_rpc" and server.develops:
                self._say(*server.rpc(asked))
            elif self.path == "/reset_prefix_cache" and server.develops:
                self._say(200, {"success": True})
            else:
                self._say(404, {"detail": "Not Found"})

        def _known(self):
            return not server.key or self.headers["Authorization"] == f"Bearer {server.key}"

        def _say(self, status, answer):
            body = json.dumps(answer).encode()
            try:
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
            except OSError:  # hung up
                self.close_connection = True

        def log_message(self, *_): ...

    return Handler


if __name__ == "__main__":  # MODEL HOST PORT ..., as slurm/vllm_server.sh starts vLLM
    with CompletionsServer(sys.argv[1], os.environ["VLLM_API_KEY"], int(sys.argv[3]), sys.argv[2]):
        threading.Event().wait()
