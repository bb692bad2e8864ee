"""config.json to the names and shapes of all parameters, without torch."""
