"""Who generates. `base` is the protocol of a sampler; each other module is one way to generate, or serves one."""
