"""Shared basics: errors, typed values, files, the terminal and the command line. It imports no other package of ours.

`errors` has the exceptions that users read. `typed` converts plain data to typed values. `disk` writes files atomically.
`console` prints to the terminal. `cli` has the parts that all commands share. `trust` and `user_code` deal with code of users.
"""
