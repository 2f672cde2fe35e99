"""What is computed: the model, its sharding and its accounting. No argv, no files, no clock."""
