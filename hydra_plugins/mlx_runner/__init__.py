"""The face by which Hydra finds our sweeper and launchers. Imported at every start of Hydra: nothing heavy here."""
