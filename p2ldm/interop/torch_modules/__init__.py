"""PyTorch code that an exported model brings along; it needs torch and diffusers, and nothing of p2ldm."""
