"""`phinetune serve`: OpenAI's API of files, fine-tuning jobs, models and answers on this machine."""
