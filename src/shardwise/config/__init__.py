"""The configuration of a run: schema, files, environment. Nothing in here imports torch."""
