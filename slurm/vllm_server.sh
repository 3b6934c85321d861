#!/usr/bin/env bash
# Starts the vLLM server of a node (launch.server_nodes). Arguments: MODEL HOST PORT GPUS CONTEXT DTYPE [OPTION ...].
# The OPTIONs are further vLLM options. GPUS is 0 on a node without GPUs, which needs a vLLM for CPUs. The environment contains
# VLLM_API_KEY, and VLLM_SERVER_DEV_MODE=1, which weight updates need. vLLM checks the key only for paths under /v1; anyone who
# can reach the port can use the other paths. Therefore HOST is an address of the private network.
set -euo pipefail
model=$1 host=$2 port=$3 gpus=$4 context=$5 dtype=$6
if [[ $gpus == 0 ]]; then
  # A chunked prefill with a seed ends the engine on a CPU. A compiled model is not faster there, and starts minutes later.
  device=(--no-enable-chunked-prefill --max-num-batched-tokens "$context" --enforce-eager)
  export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-2} # GB for the keys and values of contexts
  export VLLM_CPU_OMP_THREADS_BIND=${VLLM_CPU_OMP_THREADS_BIND:-nobind} # else vLLM binds its threads to cores of its choice
else
  device=(--tensor-parallel-size "$gpus" --weight-transfer-config '{"backend": "nccl"}')
fi
# The module is the same as `vllm serve`, which fails with a vLLM whose distribution has another name, such as vllm-cpu.
exec python -m vllm.entrypoints.openai.api_server --model "$model" --host "$host" --port "$port" --max-model-len "$context" \
  --dtype "$dtype" --generation-config vllm --logprobs-mode processed_logprobs "${device[@]}" "${@:7}"
