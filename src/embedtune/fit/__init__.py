"""TRAINED: the loop, data order, noise, checkpoints, schedules."""
