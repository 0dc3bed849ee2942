from disk_fixtures import folder, killed, power_cut, tape, unsynced  # noqa: F401  # pytest finds fixtures by name
