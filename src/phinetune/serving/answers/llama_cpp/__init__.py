"""Answers by llama.cpp (xllamacpp), for `--backend llama.cpp`: each model as a GGUF file in a process of its own.

`answerers.py` finds models and writes their files (`files.py`); `engine.py` asks the process (`process.py`) token by
token, in the place of `phinetune.engine.continuous`.
"""
