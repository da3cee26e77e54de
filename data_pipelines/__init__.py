"""Everything between raw data and a batch. Imports no JAX."""
