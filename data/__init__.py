"""From raw text to packs of tokens."""
