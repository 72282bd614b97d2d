"""Results as tables and files. Reads run folders; never loads a model."""
