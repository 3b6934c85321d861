"""What scores of runs allow to be said: pure numbers, which import nothing of ours.

`scores` makes the score of a panel from its episodes; `compare` compares arms; `power` says how many runs a difference takes.
"""
