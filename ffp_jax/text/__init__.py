"""Reading of text, and its conversion to windows of tokens."""
