"""Training presets: one YAML file each."""
