"""Floor 0: which positions are kept, and how they lie in memory."""
