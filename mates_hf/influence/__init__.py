"""How much a candidate helps: measured on a few by a probe, then predicted for all by a data influence model."""
