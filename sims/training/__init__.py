"""One optimizer step of a model on a described cluster: its seconds, where they go, and the memory that it takes."""
