"""All that is drawn on a terminal: every table, line and bar."""
