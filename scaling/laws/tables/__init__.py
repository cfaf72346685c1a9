"""Reads tables as people have them and checks them into observations."""
