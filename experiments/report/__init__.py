"""The page: records of one folder, priced, as curves, tables and their provenance. Imports no JAX."""
