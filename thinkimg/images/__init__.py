"""Images: safe decoding, what the model sees of them, its coordinates and its tools."""
