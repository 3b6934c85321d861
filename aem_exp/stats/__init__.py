"""Statistics of evaluations. Pure functions of numbers, which import no other package of ours.

`scores` computes the score of a panel from its episodes. `compare` compares arms. `power` computes how many runs are needed
to find a difference.
"""
