"""Facts: what they are, where they are read from, and where their subject and target stand in a prompt."""
