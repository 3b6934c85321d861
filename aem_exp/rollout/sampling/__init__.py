"""Samplers: what generates the responses. `base` defines the protocol; `local`, `trl_engine` and `vllm` implement it.

`server_check`, `vllm_client`, `vllm_api`, `http`, `served_weights` and `weight_sync` support the vLLM servers.
"""
