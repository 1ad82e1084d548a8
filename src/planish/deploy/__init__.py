"""Ship it: packed checkpoints and exports. Nothing is imported here, so that what needs no torch runs without it."""
