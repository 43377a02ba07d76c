"""What it costs: seconds, FLOPs and memory of each part."""
