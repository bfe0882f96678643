"""The rules that GateBench judges, one a file, each as `judge(table) -> bool`: True promotes.

A rule from elsewhere is written anew from its public description, which its docstring names.
docs/gatebench.md says what the table holds.
"""
