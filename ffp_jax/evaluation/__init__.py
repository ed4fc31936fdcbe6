"""What a model is worth: losses, protocols, tasks."""
