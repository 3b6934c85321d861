"""Measures how well the mean token entropy of a response, which AEM uses, approximates its relative surprisal S - H(s).

`command` samples at single states, and compares the samples of a state with each other. `groups` does the same at states of real
rollout groups, with the coefficients that AEM has there; `statistics` splits the correlation within and between states.
"""
