"""What every package uses, and what imports none of them: errors, typed values, files, the terminal, the command line.

`errors` holds the exceptions that a user reads; `typed` turns plain data into typed values; `disk` writes files that are
whole or absent; `console` shows progress; `cli` is what all commands share; `trust` and `user_code` guard what is not ours.
"""
