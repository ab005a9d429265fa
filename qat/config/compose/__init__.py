"""From YAML and a command line to a `TrainConfig`: all that is Hydra's and OmegaConf's."""
