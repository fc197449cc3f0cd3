"""Did it get better? Loss over held-out chats, answers to held-out prompts, base against tuned."""
