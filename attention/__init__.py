"""Floor 2: attention made of the primitives."""
