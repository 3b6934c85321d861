"""Declarative experiments in multi-turn agentic reinforcement learning, with Adaptive Entropy Modulation."""

__version__ = "0.1.0"
