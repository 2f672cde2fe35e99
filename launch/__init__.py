"""Where it runs: a ladder's spec becomes jobs, jobs become text, text becomes processes. No JAX, no arrays."""
