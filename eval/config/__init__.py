"""The configuration of a run: its schema, its layers, the presets, what there is to choose."""
