"""The defender's bench: a set, its clean twin, their victims, one defense after the other."""
