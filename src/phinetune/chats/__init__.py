"""What a chat is: messages, the checkpoint's template, control tokens, and the way to token ids and labels."""
