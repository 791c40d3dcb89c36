"""Fuzzing of every parser that bitladder owns: `make fuzz`, or `PYTHONPATH=tests python -m fuzz --help`.

`parsers` and `documents` say what is read, `rule` what may come of it, and `mutations` how a file is changed.
`__main__` runs atheris, which looks for inputs that reach new code. tests/test_fuzz.py runs the same parsers on a few
mutations.
"""
