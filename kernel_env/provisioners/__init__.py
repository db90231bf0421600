"""How kernel processes come to exist, as Jupyter knows them: by entry point."""
