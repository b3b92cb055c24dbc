"""The shapes that speed is measured at, shared by the suites and the tests."""

# Rows of activations: one token of one request, up to a whole prompt.
ROWS = (1, 2, 8, 32, 128, 512, 2048)
# (K, N): contracted elements and columns of the weights.
WEIGHTS = {
    "attention": (4096, 4096),
    "up": (4096, 14336),
    "down": (14336, 4096),
    "small": (2048, 8192),
    "encoder": (384, 1536),
    "odd": (1000, 1003),
    # Widths that are not powers of two: a 13B model's up projection, and a 7B model's attention.
    "wide": (5120, 13824),
    "mid": (3584, 3584),
    # Small language models: attention, keys, up and down of SmolLM2-135M; those of Qwen2-0.5B.
    "smol": (576, 576),
    "smol-keys": (576, 192),
    "smol-up": (576, 1536),
    "smol-down": (1536, 576),
    "qwen-up": (896, 4864),
    "qwen-down": (4864, 896),
}
