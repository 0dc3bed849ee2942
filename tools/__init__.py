"""Programs that generated files which the package ships; not part of the wheel."""
