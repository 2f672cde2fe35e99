"""A training step's time and memory in closed form, for search and for other frameworks' runs.

    ClosedForm(device).forecast(Setup(model=..., layout=..., seq_len=4096, micro_batch_seqs=1, microbatches=8))

It asks the same rates and the same network as the simulator, and knows the framework by its Practice.
"""
