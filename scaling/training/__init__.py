"""Everything that needs a device."""
