"""From bytes to rows, and from rows to messages."""
