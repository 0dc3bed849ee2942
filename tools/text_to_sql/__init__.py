"""Generator of the default data set: questions about small tables, answered in SQL."""
