"""From files of chats to token ids and labels (`read`, `formats`, `chat`, `outcome`, `build`), and looks at them."""
