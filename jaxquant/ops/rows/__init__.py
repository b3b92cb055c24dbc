"""Ways to compute `dot_general` on quantized operands: one file each, which exports its row."""
