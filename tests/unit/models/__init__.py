"""What a family states before any model is built."""
