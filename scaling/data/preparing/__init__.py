"""Turns documents into token arrays: parts by worker processes, duplicates, the manifest."""
