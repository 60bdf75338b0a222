"""The tiny run as a config file, for the command line."""

import tiny_runs


def get_config(arg=None):
    if arg == "compare":
        return tiny_runs.tiny_comparison()
    return tiny_runs.from_teacher() if arg == "teacher" else tiny_runs.tiny()
