"""Samplers: what generates the responses. `base` defines the protocol; `local`, `trl_engine` and `vllm` implement it.

`http`, `vllm_client` and `weight_sync` support the vLLM servers.
"""
