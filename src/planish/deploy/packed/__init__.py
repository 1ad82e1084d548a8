"""The parts of a checkpoint file: ``planish.deploy.checkpoint`` puts them together."""
