"""Are all backends of a bundle still the model that was trained? `comask-eval` measures and shows it."""
