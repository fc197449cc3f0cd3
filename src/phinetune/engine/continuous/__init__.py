"""Answers many conversations at once, each of which may join and leave at any token (continuous batching).

`answer_engine.AnswerEngine` is the way in. `batch.py` decides what each step computes, `step.py` computes it,
`shelves.py` and `prefixes.py` hold keys and values, `choosing.py` takes the next tokens, `low_rank.py` the adapters.
"""
