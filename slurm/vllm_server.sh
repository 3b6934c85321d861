#!/usr/bin/env bash
# Starts vLLM on a node that serves a run (launch.server_nodes): MODEL HOST PORT GPUS CONTEXT DTYPE [OPTION ...]. Options
# are vLLM's, and given for a CONTEXT beyond the positions of MODEL. The environment has VLLM_API_KEY, and VLLM_SERVER_DEV_MODE=1
# for new weights. vLLM asks for its key under /v1 alone: whoever reaches the port can do the rest, so HOST is an address of the
# private network.
exec vllm serve "$1" --host "$2" --port "$3" --tensor-parallel-size "$4" --max-model-len "$5" --dtype "$6" \
  --generation-config vllm --logprobs-mode processed_logprobs --weight-transfer-config '{"backend": "nccl"}' "${@:7}"
