"""The commands, one module each: a `Config` and `run(config) -> exit code`."""
