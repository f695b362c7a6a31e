"""A standing campaign of hostile inputs: each must end in a result, or in one line and exit code 2.

`python -m tests.fuzz FORMAT --minutes 10` tries changed valid files of a format (`formats.FORMATS`) in a child process
with limits of time and memory. Inputs that were once lost are kept in `corpus/`, and changed too.
"""
