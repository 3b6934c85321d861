"""A small server with vLLM's completions protocol that generates with a real policy on the CPU.

It implements token ids in both directions, seeds, temperature and filters, end tokens, budgets, log-probs, the API key (required
only under /v1, as in vLLM), reloading weights from a folder, and error messages. It has no batching: it answers one request
after another. Tests can make it slow, let it fail or return wrong answers, or disable reloading.
"""

import contextlib
import json
import os
import re
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from safetensors.torch import load_file

from aem_exp.rollout.sampling.agreement import next_token_logps
from aem_exp.rollout.sampling.base import SamplingParams
from aem_exp.rollout.sampling.local import LocalSampler

REQUIRED_FIELDS = {
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
    """Serves within its context.

    Args:
        policy: a folder of weights, or a loaded model.
        port: port to listen on, for example that of a server that it replaces; 0: any free port.

    Attributes:
        asked: all completion requests in order of arrival, including failed ones.
        reloads: names of the folders whose weights were loaded.
        fails: statuses that the next completion requests get instead of an answer.
        seconds: additional duration of each completion request.
        twist: changes an answer before it is sent.
        raw: sends the whole answer to a completion request, given the handler; None: the server does.
        develops: whether it acts as with VLLM_SERVER_DEV_MODE=1, so that it can reload weights.
        longest: the max_model_len that it reports.
        root: the weights that it reports to have been started with.
        adapters: whether it knows LoRA adapters; it cannot load any.
        ends_at: number of the completion request at which the server stops without an answer; 0: never.
        ended: set when the server has stopped.
        stale: a regular expression; tensors with matching names keep their values when weights are loaded.
        compared: number of requests that compared it with the trainer.
    """

    def __init__(self, policy, key="", port=0, host="127.0.0.1"):
        self.develops, self.longest, self.root = True, 1 << 20, str(policy)
        self.adapters = False
        self.model = load_policy(policy) if isinstance(policy, str | Path) else policy
        self.key, self.seconds, self.twist, self.raw = key, 0.0, lambda answer: answer, None
        self.asked, self.reloads, self.fails = [], [], []
        self.ends_at, self.ended = 0, threading.Event()
        self.at_once = self.most_at_once = 0
        self.stale, self.compared = "", 0
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
        for connection in self._http.connections:  # as if the process had been killed
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.ended.set()

    def compare(self, request):
        """Answer a request for likely next tokens."""
        time.sleep(self.seconds)
        with self._lock:
            self.compared += 1
            logps_PV = next_token_logps(self.model, request["prompt"], torch.device("cpu"))
        tops = [logps_V.topk(min(request["logprobs"], len(logps_V))) for logps_V in logps_PV]
        named = [
            {f"token_id:{n}": v for v, n in zip(top.values.tolist(), top.indices.tolist(), strict=True)} for top in tops
        ]
        choices = [{"index": i, "logprobs": {"top_logprobs": [top]}} for i, top in enumerate(named)]
        return 200, {"object": "text_completion", "choices": choices[::-1]}  # in any order

    def complete(self, request):
        if request.get("return_tokens_as_token_ids"):
            return self.compare(request)
        with self._lock:
            self.asked.append(request)
            stops = len(self.asked) == self.ends_at
        if stops:
            self.__exit__()
            return 500, {}
        with self._lock:
            if self.fails:
                return self.fails.pop(0), {"error": {"message": "the engine is not well"}}
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            if missing := REQUIRED_FIELDS - request.keys():
                return 400, {"error": {"message": f"missing fields: {missing}"}}
            time.sleep(self.seconds)
            with self._lock:
                return 200, self.twist(self._answer(request))
        finally:
            with self._lock:
                self.at_once -= 1

    def _answer(self, request):
        torch.set_num_threads(1)
        sampling = SamplingParams(*(request[name] for name in ("temperature", "top_p", "top_k", "min_p")))
        session = LocalSampler(self.model, request["stop_token_ids"], sampling).session()
        (sample,) = session.generate([0], [request["prompt"]], [(request["seed"],)], [request["max_tokens"]])
        ended = sample.ids[-1] in request["stop_token_ids"]
        choice = {
            "index": 0,
            "text": "never read",
            "finish_reason": "stop" if ended else "length",
            "token_ids": sample.ids,
            "prompt_token_ids": request["prompt"],
            "logprobs": {"token_logprobs": sample.logps, "tokens": ["?"] * len(sample.ids)},
        }
        return {"object": "text_completion", "choices": [choice]}

    def models(self):
        card = {"id": "policy", "object": "model", "root": self.root, "parent": None, "max_model_len": self.longest}
        return 200, {"object": "list", "data": [card, card | {"id": "other", "root": "/adapter", "parent": "policy"}]}

    def rpc(self, request):
        if request["method"] != "reload_weights":
            return 400, {"error": {"message": "no such method"}}
        folder = Path(request["kwargs"]["weights_path"])
        if not folder.is_dir():
            return 500, {"error": {"message": f"cannot find {folder}"}}
        with self._lock:
            state = {name: weight for file in folder.glob("*.safetensors") for name, weight in load_file(file).items()}
            if self.stale:
                self._untie_head()
                state = {name: weight for name, weight in state.items() if not re.search(self.stale, name)}
            missing, unexpected = self.model.load_state_dict(state, strict=False)
            old = [name for name in missing if "lm_head" not in name and not re.search(self.stale or "^$", name)]
            assert not unexpected and not old, (missing, unexpected)  # a tied head may be missing
            self.reloads.append(folder.name)
        return 200, {"results": [None]}

    def _untie_head(self):
        """Give a tied head its own copy of the weights, as vLLM does on a CPU."""
        if self.model.lm_head.weight is self.model.get_input_embeddings().weight:
            self.model.lm_head.weight = torch.nn.Parameter(self.model.lm_head.weight.detach().clone())


def load_policy(folder):
    """Load a policy. Two threads must not load at the same time: transformers would leave models incomplete."""
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
            if self.path.startswith("/v1/") and not self._is_authorized():
                self._send(401, {"error": "Unauthorized"})
            elif self.path == "/v1/models":
                self._send(*server.models())
            else:
                self._send(200 if self.path == "/health" else 404, {})

        def do_POST(self):
            length = int(self.headers["Content-Length"])
            if len(body := self.rfile.read(length)) < length:  # the client closed the connection
                self.close_connection = True
                return
            request = json.loads(body)
            if self.path.startswith("/v1/") and not self._is_authorized():
                self._send(401, {"error": "Unauthorized"})
            elif self.path == "/v1/completions" and server.raw:
                self.close_connection = True
                with contextlib.suppress(OSError):  # the client closed the connection
                    server.raw(self)
            elif self.path == "/v1/completions":
                self._send(*server.complete(request))
            elif self.path == "/collective_rpc" and server.develops:
                self._send(*server.rpc(request))
            elif self.path == "/v1/load_lora_adapter" and server.adapters:
                self._send(400, {"error": "Both 'lora_name' and 'lora_path' must be provided."})
            elif self.path == "/reset_prefix_cache" and server.develops:
                self._send(200, {"success": True})
            else:
                self._send(404, {"detail": "Not Found"})

        def _is_authorized(self):
            return not server.key or self.headers["Authorization"] == f"Bearer {server.key}"

        def _send(self, status, answer):
            body = json.dumps(answer).encode()
            try:
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
            except OSError:  # the client closed the connection
                self.close_connection = True

        def log_message(self, *_): ...

    return Handler


if __name__ == "__main__":  # arguments MODEL HOST PORT ..., as slurm/vllm_server.sh starts vLLM
    with CompletionsServer(sys.argv[1], os.environ["VLLM_API_KEY"], int(sys.argv[3]), sys.argv[2]):
        threading.Event().wait()
