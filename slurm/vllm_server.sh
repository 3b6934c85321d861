#!/usr/bin/env bash
# Starts the vLLM server of a node (launch.server_nodes). Arguments: MODEL HOST PORT GPUS CONTEXT DTYPE [OPTION ...].
# The OPTIONs are vLLM options for a CONTEXT above the position limit of MODEL. The environment contains VLLM_API_KEY, and
# VLLM_SERVER_DEV_MODE=1, which weight updates need. vLLM checks the key only for paths under /v1; anyone who can reach the port
# can use the other paths. Therefore HOST is an address of the private network.
exec vllm serve "$1" --host "$2" --port "$3" --tensor-parallel-size "$4" --max-model-len "$5" --dtype "$6" \
  --generation-config vllm --logprobs-mode processed_logprobs --weight-transfer-config '{"backend": "nccl"}' "${@:7}"
