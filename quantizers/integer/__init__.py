"""The IntegerProgram: its definition, verifier, reference interpreter and file format."""
