"""How it is told: the table, the JSON, the requests file, the page."""
