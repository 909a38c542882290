"""Speed and quality beside the peers, in one run: ``python -m benchmarks gmm|linear|vae``."""
