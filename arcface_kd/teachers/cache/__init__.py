"""The teacher's embeddings of each image, kept in a file."""
