"""Graph passes, one file each: see the map in README."""
