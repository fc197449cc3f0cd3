"""From a file of chats to token ids and labels: `read`, `formats`, `chat`, `build`, in that order."""
