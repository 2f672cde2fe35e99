"""Rungs that are not attached: compile the train step for them, read the schedule, simulate it."""
