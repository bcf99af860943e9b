"""What the package does on a GPU: ``python -m benchmarks.gpu`` checks and measures it, and writes a report."""
