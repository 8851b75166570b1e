"""The commands of ``smoa``, one file each, apart from reading their arguments.

Each function is one command: its keyword arguments are the command's options, its docstring their
help, its return value the exit status.
"""
