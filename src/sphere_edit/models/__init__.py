"""Language models: what their families call things, loading, their edited matrices, and forward passes."""
