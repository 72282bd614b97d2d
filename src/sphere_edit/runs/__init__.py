"""What happens to a stream of facts, and the folder that keeps it: records, history, weights, the stream itself."""
