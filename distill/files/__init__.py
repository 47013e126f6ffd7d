"""Reading and writing files safely: distilled sets, triggers, other projects' sets."""
