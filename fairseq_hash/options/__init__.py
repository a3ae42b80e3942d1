"""Every option of the plugin as a dataclass field, with its check, and when it has an effect."""
