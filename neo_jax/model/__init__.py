"""The model: one decoder over a token table. Start reading at transformer.py."""
