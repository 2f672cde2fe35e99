"""CPU, 8 virtual devices, shapes checked, everything sloppy an error. Set before JAX is imported."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
