"""Random bases that a key defines: they map an update of d weights to K coordinates, and coordinates to an update."""
