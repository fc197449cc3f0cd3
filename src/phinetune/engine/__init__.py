"""All that makes a step or an answer fast. It knows torch, transformers and PEFT, and no data file."""
