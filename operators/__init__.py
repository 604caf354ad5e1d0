"""What is done to data: pure Arrow, NumPy, torch and faiss in, the same out. No Ray, no object storage, no YAML."""
