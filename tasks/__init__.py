"""What can be trained: one folder for each task, each with its `training.task.Task`."""
