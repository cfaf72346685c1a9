"""The results and the work folder of a sweep: its cells, who holds it, what it has planned, forecast and done."""
